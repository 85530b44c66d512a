"""From the names that training sides give to modules to the names that the base gives to them.

base_model.model.encoder.fc        PEFT's wrapper
diffusion_model.blocks.0.attn      a pipeline's part, before the part's own names; also `transformer.`, `unet.`
lora_unet_blocks_0_attn_to_q       LyCORIS and kohya: every dot became an underscore, as only a base can undo
layer.base_layer                   the module that PEFT and FLoRA put inside their own
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from tpeft_deploy.errors import FormatError, UnknownTarget

__all__ = ["PEFT_PREFIX", "Names", "inner"]

PEFT_PREFIX = "base_model.model."

# Tried in this order, and only where the rest is in the base: a base may itself have a module `transformer`.
_PARTS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "text_encoder.")
_DOTTED = (PEFT_PREFIX, *_PARTS, "model.")
_UNDERSCORED = ("lycoris_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lora_transformer_")


def inner(name: str) -> str:
    """A name without the `base_layer` that a training side put between a module and its own parameters."""
    return name.replace(".base_layer.", ".").removesuffix(".base_layer")


@dataclass(frozen=True)
class Names:
    """Resolves module names against a base, or without one where that is certain.

    Args:
        source: where the adapter was read from, for messages.
        base: the base's name, for messages; None when there is none.
        weights: names of the base's parameters and buffers.
    """

    source: str
    base: str | None = None
    weights: frozenset[str] = frozenset()
    _modules: frozenset[str] = field(init=False)
    _underscored: Mapping[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        modules = {name[:dot] for name in self.weights for dot in _dots(name)}
        by_underscore: dict[str, list[str]] = defaultdict(list)
        for module in sorted(modules):
            by_underscore[module.replace(".", "_")].append(module)
        object.__setattr__(self, "_modules", frozenset(modules))
        object.__setattr__(self, "_underscored", dict(by_underscore))

    def module(self, key: str) -> str:
        """The dotted path in the base of the module that a file calls `key`.

        Raises:
            FormatError: an underscore name that no base is there to resolve, or that stands for several modules.
            UnknownTarget: an underscore name that stands for no module of the base.
        """
        name = self._strip(inner(key), self._modules)
        prefix = next((prefix for prefix in _UNDERSCORED if name.startswith(prefix)), None)
        if name in self._modules or "." in name or prefix is None:
            return name
        return self._resolve(key, name.removeprefix(prefix))

    def weight(self, key: str) -> str:
        """The base's name of the parameter or buffer that a file calls `key`."""
        return self._strip(inner(key), self.weights)

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
        found = self._underscored.get(rest, [])
        if len(found) > 1:
            raise FormatError(
                doing,
                expected=f"one module of {self.base}",
                got=f"{', '.join(found)}, which the file calls by one name",
                fix="Train again with module names that differ by more than dots and underscores.",
            )
        if not found:
            raise UnknownTarget(
                doing,
                expected=f"a module of {self.base} that is called {rest!r} with underscores for dots",
                got="none",
                fix="The adapter was made for another base.",
            )
        return found[0]


def _dots(name: str) -> list[int]:
    return [position for position, letter in enumerate(name) if letter == "."]
