"""From the names that training sides give to modules to the names that the base gives to them.

base_model.model.encoder.fc        PEFT's wrapper
diffusion_model.blocks.0.attn      a pipeline's part, before the part's own names; also `transformer.`, `unet.`
lora_unet_blocks_0_attn_to_q       LyCORIS and kohya: every dot became an underscore, as only a base can undo
layer.base_layer                   the module that PEFT and FLoRA put inside their own
input_blocks.4.1.proj_in           other schemes of names, see `name_maps`

An adapter for a part of a model has the part's prefix before the part's own names; see `parts`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from tpeft_deploy.errors import FormatError, UnknownTarget
from tpeft_deploy.formats.name_maps import other_names

__all__ = ["PEFT_PREFIX", "UNDERSCORED", "Names", "inner", "rest_of"]

PEFT_PREFIX = "base_model.model."

# Tried in this order, and only where the rest is in the base: a base may itself have a module `transformer`.
_PARTS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.", "text_encoder_2.")
_DOTTED = (PEFT_PREFIX, *_PARTS, "model.")
_CHECK_BASE = "Check that the base is what the adapter was trained on."
UNDERSCORED = ("lycoris_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lora_transformer_")


def inner(name: str) -> str:
    """A name without the `base_layer` that a training side put between a module and its own parameters."""
    return name.replace(".base_layer.", ".").removesuffix(".base_layer") if ".base_layer" in name else name


def rest_of(key: str, part: str) -> str | None:
    """What follows a part's prefix in a module's name; None where the module is not of the part.

    Args:
        key: the module as a file names it.
        part: the prefix: "model.language_model", or "lora_unet" where underscores stand for dots.
    """
    name, part = inner(key).removeprefix(PEFT_PREFIX), part.removeprefix(PEFT_PREFIX).rstrip("._")
    joint = "_" if f"{part}_".startswith(UNDERSCORED) else "."
    return name.removeprefix(part + joint) if name.startswith(part + joint) else None


@dataclass(frozen=True)
class Names:
    """Resolves module names against a base, or without one where that is certain.

    Args:
        source: path of the adapter, for messages.
        base: the base's name, for messages; None when there is none.
        weights: names of the base's parameters and buffers.
        part: prefix of the part of the trained model that the base is; empty for the whole model.
        parts: finds prefixes of the parts that the file has, for messages.
    """

    source: str
    base: str | None = None
    weights: frozenset[str] = frozenset()
    part: str = ""
    parts: Callable[[], Sequence[str]] = tuple
    _modules: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        modules: set[str] = set()
        for name in self.weights:
            module = name.rpartition(".")[0]
            while module and module not in modules:  # those around one that is known are known too
                modules.add(module)
                module = module.rpartition(".")[0]
        object.__setattr__(self, "_modules", frozenset(modules))

    def module(self, key: str) -> str:
        """The dotted path in the base of the module that a file calls `key`.

        Raises:
            FormatError: an underscore name that no base is there to resolve, or that stands for several modules.
            UnknownTarget: an underscore name that stands for no module of the base.
        """
        keys = self._own(key)
        names = [self._strip(own, self._modules) for own in keys]
        for name in names:
            if name in self._modules:
                return name
        for own in keys if self._others else ():
            other = self._strip(own, self._others.keys())
            if len(self._others.get(other, ())) == 1:
                return min(self._others[other])
        name = inner(key)
        if not name.startswith(UNDERSCORED) or "." in names[0]:
            return names[0]
        prefix = next(prefix for prefix in UNDERSCORED if name.startswith(prefix))
        return self._resolve(key, names[0].removeprefix(prefix))

    def weight(self, key: str) -> str:
        """The base's name of the parameter or buffer that a file calls `key`."""
        names = [self._strip(own, self.weights) for own in self._own(key)]
        owner, _, leaf = names[0].rpartition(".")
        others = self._others.get(self._strip(owner, self._others.keys()), ())
        named = [f"{other}.{leaf}" for other in others if f"{other}.{leaf}" in self.weights]
        return next((name for name in [*names, *named] if name in self.weights), names[0])

    def _own(self, key: str) -> list[str]:
        """A name as the part has it: the rest of it, or the whole where the part's class keeps the prefix."""
        rest = rest_of(key, self.part) if self.part else None
        return [inner(key)] if rest is None else [rest, inner(key)]

    @cached_property
    def _others(self) -> Mapping[str, Set[str]]:
        return other_names(self._modules) if self._modules else {}

    def _strip(self, name: str, known: Set[str]) -> str:
        if self.base is None:
            return name.removeprefix(PEFT_PREFIX)
        for _ in range(3):  # wrappers may be nested: FLoRA needs one for linear and one for conv layers
            if name in known:
                return name
            shorter = [name.removeprefix(prefix) for prefix in _DOTTED if name.startswith(prefix)]
            found = next((short for short in shorter if short in known), None)
            if found is not None:
                return found
            if not shorter:
                break
            name = shorter[0]
        return name.removeprefix(PEFT_PREFIX)

    def _resolve(self, key: str, rest: str) -> str:
        doing = f"read {self.source}, module {key!r}"
        if self.base is None:
            if "_" not in rest:
                return rest
            raise FormatError(
                doing,
                expected="a base to find the module in, as the file writes dots and underscores alike",
                got="none",
                fix="Give base= (--base on the command line).",
            )
        found = self._underscored.get(rest, []) or self._others_underscored.get(rest, [])
        if len(found) > 1:
            raise FormatError(
                doing,
                expected=f"one module of {self.base}",
                got=f"{', '.join(found)}, which the file calls by one name",
                fix="Train again with module names that differ by more than dots and underscores.",
            )
        if not found:
            parts = self.parts()
            raise UnknownTarget(
                doing,
                expected=f"a module of {self.base} that is called {rest!r} with underscores for dots",
                got="none",
                fix=_CHECK_BASE if len(parts) < 2 else f"The file has {', '.join(parts)}: give one as --part.",
            )
        return found[0]

    @cached_property
    def _underscored(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._modules):
            found[name.replace(".", "_")].append(name)
        return found

    @cached_property
    def _others_underscored(self) -> Mapping[str, list[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for name, modules in self._others.items():
            found[name.replace(".", "_")] |= modules
        return {name: sorted(modules) for name, modules in found.items()}
