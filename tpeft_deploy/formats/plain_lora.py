"""LoRA under PEFT's names in a single file, without adapter_config.json: ai-toolkit, ComfyUI, newer diffusers.

    dW = s B A        lora_A.weight (r, I, K1, ...), lora_B.weight (O, r, 1, ...)

with s = alpha / r if the file has an alpha.  If it has none, tools disagree (1, or the value of a missing
configuration), so the scale must be given.
"""

from __future__ import annotations

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.products.compact import low_rank
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take, take_scale
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "plain-lora"
ABOUT = About(
    "ai-toolkit, ComfyUI, newer diffusers",
    "LoRA",
    "linear, conv",
    "no",
    "low-rank",
    "the scale must be given if the file has no alpha",
)
_A, _B = "lora_A.weight", "lora_B.weight"
SUFFIXES = frozenset({_A, _B, "alpha"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has one of the pair, in a file without a configuration."""
    return not checkpoint.config and (_A in module.tensors or _B in module.tensors)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change.

    Raises:
        FormatError: a tensor is missing or does not fit the other, or neither alpha nor a scale was given.
    """
    down, up = take(module, checkpoint, _A), take(module, checkpoint, _B)
    if "alpha" not in module.tensors and checkpoint.scale is None:
        raise FormatError(
            doing(module, checkpoint),
            problem="the file has no alpha and came without adapter_config.json, so the scale is unknown",
            fix="Give the directory that holds both files, or scale= (lora_alpha / r; 1.0 for ai-toolkit).",
        )
    scale, _ = take_scale(module, checkpoint, max(down.shape[0], 1) if down.ndim else 1)
    with reporting(module, checkpoint):
        if up.ndim != down.ndim or any(size != 1 for size in up.shape[2:]):
            raise ValueError(f"lora_B has shape {up.shape} beside lora_A {down.shape}")
        if down.ndim == 2:
            delta = low_rank(up, down, scale)
        else:
            delta = TuckerDelta(down, (up.reshape(up.shape[:2]), *[None] * (down.ndim - 1)), scale)
    return Change(deltas={f"{module.name}.weight": delta})
