"""LoRA under PEFT's names in a single file, without adapter_config.json: ai-toolkit, ComfyUI, newer diffusers.

    dW = s B A        lora_A.weight (r, I, K1, ...), lora_B.weight (O, r, 1, ...)

with s = alpha / r if the file has an alpha.  If it has none, tools disagree (1, or the value of a missing
configuration), so the scale must be given.
"""

from __future__ import annotations

from tpeft_deploy.algebra import low_rank
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader, without_config
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["read_plain_lora"]

_A, _B = "lora_A.weight", "lora_B.weight"


@reader(
    "plain-lora",
    About(
        "ai-toolkit, ComfyUI, newer diffusers",
        "LoRA",
        "linear, conv",
        "no",
        "low-rank",
        "the scale must be given if the file has no alpha",
    ),
    {_A, _B, "alpha"},
    marks={_A, _B},
    matches=without_config,
)
def read_plain_lora(module: Module) -> Change:
    """The module's change."""
    down, up = module.take(_A), module.take(_B)
    if "alpha" not in module.tensors and module.checkpoint.scale is None:
        raise FormatError(
            module.doing,
            problem="the file has no alpha and came without adapter_config.json, so the scale is unknown",
            fix="Give the directory that holds both files, or scale= (lora_alpha / r; 1.0 for ai-toolkit).",
        )
    scale, _ = module.take_scale(max(down.shape[0], 1) if down.ndim else 1)
    with module.reporting():
        if up.ndim != down.ndim or any(size != 1 for size in up.shape[2:]):
            raise ValueError(f"lora_B has shape {up.shape} beside lora_A {down.shape}")
        if down.ndim == 2:
            delta = low_rank(up, down, scale)
        else:
            delta = TuckerDelta(down, (up.reshape(up.shape[:2]), *[None] * (down.ndim - 1)), scale)
    return Change(deltas={f"{module.name}.weight": delta})
