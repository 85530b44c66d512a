"""What readers of training-side files share: a checkpoint cut into modules, the base it belongs to, and a change.

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

__all__ = [
    "BaseView",
    "Change",
    "Checkpoint",
    "Module",
    "base_array",
    "doing",
    "needs_base",
    "no_scale",
    "reporting",
    "take",
    "take_scale",
]


@dataclass(frozen=True, eq=False)
class BaseView:
    """The names and values of a base's parameters and buffers.

    Args:
        name: for messages.
        weights: name -> array; every name of a tied weight.
        kinds: module path -> class name of the layer, where it is known ("Linear", "Conv2d", "MultiheadAttention").
        shapes, digests: of weights, where they are known without reading them.
    """

    name: str
    weights: Mapping[str, Array]
    kinds: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self.shapes[name] if name in self.shapes else self.weights[name].shape

    def digest(self, name: str) -> str:
        """The `weight_digest` of a weight."""
        return self.digests[name] if name in self.digests else weight_digest(self.weights[name])


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a training side saved.

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
    trained: Mapping[str, str] = field(default_factory=dict)
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
        owner, _, leaf = name.rpartition(".")
        own = f"{self.trained[owner]}.{leaf}" if owner in self.trained else name
        return self.trained.get(name, own)


@dataclass(eq=False)
class Module:
    """The tensors of one module; a reader pops what it understands, and what is left makes the load fail.

    Args:
        name: dotted path of the module in the base, without prefixes, e.g. "encoder.layer.0.query".
        tensors: suffix -> tensor, e.g. "lora_A.weight".
        key: the module as the file names it, for messages; underscore names differ from `name`.
    """

    name: str
    tensors: dict[str, Array]
    key: str


@dataclass(frozen=True, eq=False)
class Change:
    """What one module contributes to an adapter; all names are whole names of the base's parameters.

    Args:
        deltas, overrides, gains, notes: as in Adapter.
        digests: digests of base weights that the change was computed from, and holds for alone.
    """

    deltas: Mapping[str, TuckerDelta] = field(default_factory=dict)
    overrides: Mapping[str, Array] = field(default_factory=dict)
    gains: Mapping[str, Array] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


def doing(module: Module, checkpoint: Checkpoint) -> str:
    """What an error about a module says was being done."""
    return f"read {checkpoint.source}, module {module.key!r}"


@contextmanager
def reporting(module: Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what algebra raises about shapes and values into a FormatError that names the module."""
    try:
        yield
    except (ShapeError, ValueError, IndexError) as error:
        raise FormatError(
            doing(module, checkpoint),
            problem=f"its tensors do not fit each other or the weight ({error})",
            fix="Check that the file is whole and was trained on this base.",
        ) from error


def take(module: Module, checkpoint: Checkpoint, suffix: str) -> Array:
    """Pop a tensor that the module's format cannot do without.

    Raises:
        FormatError: it is not there.
    """
    if suffix not in module.tensors:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a tensor {suffix}",
            got=f"only {', '.join(sorted(module.tensors)) or 'nothing'}",
            fix="The file is not whole: save or copy the adapter again.",
        )
    return module.tensors.pop(suffix)


def take_scale(module: Module, checkpoint: Checkpoint, rank: int) -> tuple[float, str | None]:
    """Pop alpha: the factor alpha / rank, and a note where the file has none.

    Without alpha the factor is what the caller gave as scale, else 1.

    Raises:
        FormatError: alpha is not one finite number, the rank is 0, or the caller gave a scale beside it.
    """
    alpha = module.tensors.pop("alpha", None)
    if alpha is None:
        if checkpoint.scale is not None:
            return checkpoint.scale, None
        return 1.0, "the file has no alpha, so the change is taken as it is, with scale 1"
    no_scale(module, checkpoint)
    if rank == 0:
        raise FormatError(doing(module, checkpoint), expected="a rank of at least 1", got="tensors of rank 0")
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise FormatError(
            doing(module, checkpoint),
            expected="one finite number as alpha",
            got=f"{alpha.reshape(-1)[:4].tolist()} of dtype {alpha.dtype}",
            fix="float16 ends at 65504: save the adapter again in float32, or with alpha equal to the rank.",
        )
    return float(alpha.reshape(())) / rank, None


def no_scale(module: Module, checkpoint: Checkpoint) -> None:
    """Refuse a scale that the caller gave for a module that states its own."""
    if checkpoint.scale is not None:
        raise FormatError(
            doing(module, checkpoint),
            expected="no scale, as the module states its own",
            got=f"scale={checkpoint.scale}",
            fix="Leave scale out.",
        )


def needs_base(module: Module, checkpoint: Checkpoint, why: str) -> FormatError:
    """The error of a reader that cannot do without the base."""
    return FormatError(
        doing(module, checkpoint),
        problem=f"{why} and no base was given",
        fix="Give base=, the model that the adapter was trained on.",
    )


def base_array(module: Module, checkpoint: Checkpoint, tensor: str, why: str) -> Array:
    """A parameter of the module in the base.

    Args:
        module: the module.
        checkpoint: its checkpoint.
        tensor: "weight" or "bias".
        why: purpose of the base, as a clause.

    Raises:
        FormatError: no base was given, or its module has no such parameter.
    """
    if checkpoint.base is None:
        raise needs_base(module, checkpoint, why)
    name = f"{module.name}.{tensor}"
    if name not in checkpoint.base.weights:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"{name!r} in {checkpoint.base.name}",
            got="no parameter of that name",
            fix="Check that the base is what the adapter was trained on.",
        )
    return checkpoint.base.weights[name]
