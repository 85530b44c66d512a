"""Types that readers share: a checkpoint cut into modules, the base, and the change of a module.

A training-side file is a set of tensors `<module>.<suffix>`.  The suffixes of one module say which method wrote them,
so a format is chosen per module, never per file: files with several methods exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import FormatError, ShapeError
from tpeft_deploy.formats.read.patterns import Endings, Patterns
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["BaseView", "Change", "Checkpoint", "Module"]


@dataclass(frozen=True, eq=False)
class BaseView:
    """The names and values of a base's parameters and buffers.

    Args:
        name: name for messages.
        weights: name -> array; every name of a tied weight.
        kinds: module path -> class name of the layer, where it is known ("Linear", "Conv2d", "MultiheadAttention").
        shapes, digests: shape and digest of each weight, where known without reading it.
        unread: names of further weights of the model, which no output depends on: nothing is known of them.
    """

    name: str
    weights: Mapping[str, Array]
    kinds: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Names of all weights of the model, unread ones included."""
        return self.unread.union(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self.shapes[name] if name in self.shapes else self.weights[name].shape

    def digest(self, name: str) -> str:
        """The `weight_digest` of a weight."""
        return self.digests[name] if name in self.digests else weight_digest(self.weights[name])


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Content of a training library's files.

    Args:
        source: path it was read from, for messages.
        config: adapter_config.json of a PEFT directory, else empty.
        metadata: the safetensors header's.
        scale: scale that the caller gave for formats that do not record one.
        base: the base, when the caller gave it; readers that need it raise FormatError without it, saying
            "give base=".
        shared: tensors that belong to no single module (VeRA's projections), by their whole key.
        used: keys of `shared` that a reader took by SHARED_PREFIXES.
        trained: name of a module in the base -> the name it had in the model that was trained, which configurations
            mean; they differ where the base is a part of that model.
        part: prefix of that part; empty for the whole model.
        memo: results that readers compute once for all modules.
    """

    source: str
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    scale: float | None
    base: BaseView | None
    shared: dict[str, Array] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    trained: dict[str, str] = field(default_factory=dict)
    part: str = ""
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> Mapping[str, list[str]]:
        """Module of the base -> the parameters that it holds itself, in the base's order."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.base.weights if self.base is not None else ():
            found[name.rpartition(".")[0]].append(name)
        return dict(found)

    def matcher(self, field: str, *, whole: bool) -> Patterns:
        """The patterns of a field: the text that it is, or the keys that it has; compiled once.

        Args:
            field: name of the field.
            whole: as in Patterns.
        """
        if field not in self.memo:
            found = self.config.get(field) or ()
            patterns = [found] if isinstance(found, str) else list(found)
            self.memo[field] = Patterns(patterns, whole=whole, field=field, source=self.source)
        matcher: Patterns = self.memo[field]
        return matcher

    def endings(self, field: str) -> Endings:
        """The list of a field as endings of names."""
        if field not in self.memo:
            self.memo[field] = Endings(self.config.get(field) or ())
        endings: Endings = self.memo[field]
        return endings

    def trained_name(self, name: str) -> str:
        """The name that a module, or a parameter of one, had in the model that was trained."""
        if name in self.trained:
            return self.trained[name]
        owner, _, leaf = name.rpartition(".")
        return f"{self.trained[owner]}.{leaf}" if owner in self.trained else name


@dataclass(frozen=True, eq=False)
class Change:
    """Contribution of one module to an adapter; all names are whole names of the base's parameters.

    Args:
        deltas, overrides, gains, notes: fields of the same names in Adapter.
        digests: digests of base weights that the change was computed from, and holds for alone.
    """

    deltas: Mapping[str, TuckerDelta] = field(default_factory=dict)
    overrides: Mapping[str, Array] = field(default_factory=dict)
    gains: Mapping[str, Array] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Module:
    """The tensors of one module; a reader pops those that it consumes, and the load fails if any is left.

    Args:
        name: dotted path of the module in the base, without prefixes, e.g. "encoder.layer.0.query".
        tensors: suffix -> tensor, e.g. "lora_A.weight".
        key: the module as the file names it, for messages; underscore names differ from `name`.
        checkpoint: checkpoint of the module.
    """

    name: str
    tensors: dict[str, Array]
    key: str
    checkpoint: Checkpoint

    @property
    def doing(self) -> str:
        """Operation that an error about the module names."""
        return f"read {self.checkpoint.source}, module {self.key!r}"

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn errors of the algebra about shapes and values into a FormatError that names the module."""
        try:
            yield
        except (ShapeError, ValueError, IndexError) as error:
            raise FormatError(
                self.doing,
                problem=f"its tensors do not fit each other or the weight ({error})",
                fix="Check that the file is whole and was trained on this base.",
            ) from error

    def take(self, suffix: str) -> Array:
        """Pop a tensor that the format requires.

        Raises:
            FormatError: it is not there.
        """
        if suffix not in self.tensors:
            raise FormatError(
                self.doing,
                expected=f"a tensor {suffix}",
                got=f"only {', '.join(sorted(self.tensors)) or 'nothing'}",
                fix="The file is not whole: save or copy the adapter again.",
            )
        return self.tensors.pop(suffix)

    def take_scale(self, rank: int) -> tuple[float, str | None]:
        """Pop alpha: the factor alpha / rank, and a note where the file has none.

        Without alpha the factor is what the caller gave as scale, else 1.

        Raises:
            FormatError: alpha is not one finite number, the rank is 0, or the caller gave a scale beside it.
        """
        alpha = self.tensors.pop("alpha", None)
        if alpha is None:
            if self.checkpoint.scale is not None:
                return self.checkpoint.scale, None
            return 1.0, "the file has no alpha, so the change is taken as it is, with scale 1"
        self.no_scale()
        if rank == 0:
            raise FormatError(self.doing, expected="a rank of at least 1", got="tensors of rank 0")
        if alpha.size != 1 or not np.isfinite(alpha).all():
            raise FormatError(
                self.doing,
                expected="one finite number as alpha",
                got=f"{alpha.reshape(-1)[:4].tolist()} of dtype {alpha.dtype}",
                fix="float16 ends at 65504: save the adapter again in float32, or with alpha equal to the rank.",
            )
        return float(alpha.reshape(())) / rank, None

    def no_scale(self) -> None:
        """Refuse a scale from the caller, for a module that records its scale."""
        if self.checkpoint.scale is not None:
            raise FormatError(
                self.doing,
                expected="no scale, as the module records it",
                got=f"scale={self.checkpoint.scale}",
                fix="Leave scale out.",
            )

    def misfit(self, expected: str, got: object) -> FormatError:
        """The error for tensors that do not fit each other or the base."""
        return FormatError(
            self.doing,
            expected=expected,
            got=got,
            fix="Check that the file is whole and was trained on this base.",
        )

    def needs_base(self, why: str) -> FormatError:
        """The error of a reader that cannot do without the base."""
        return FormatError(
            self.doing,
            problem=f"{why} and no base was given",
            fix="Give base=, the model that the adapter was trained on.",
        )

    def base_array(self, tensor: str, why: str) -> Array:
        """Look up a parameter of the module in the base.

        Args:
            tensor: "weight" or "bias".
            why: purpose of the base, as a clause.

        Raises:
            FormatError: no base was given, or its module has no such parameter.
        """
        if self.checkpoint.base is None:
            raise self.needs_base(why)
        name = f"{self.name}.{tensor}"
        if name not in self.checkpoint.base.weights:
            raise FormatError(
                self.doing,
                expected=f"{name!r} in {self.checkpoint.base.name}",
                got="no parameter of that name",
                fix="Check that the base is what the adapter was trained on.",
            )
        return self.checkpoint.base.weights[name]
