"""What readers of training-side files share: a checkpoint cut into modules, the base it belongs to, and a change.

A training-side file is a set of tensors `<module>.<suffix>`.  The suffixes of one module say which method wrote them,
so a format is chosen per module, never per file: files with several methods exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.formats.read.patterns import Endings, Patterns
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["BaseView", "Change", "Checkpoint", "Module"]


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
