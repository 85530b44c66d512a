"""LoRA and LoCon as kohya's sd-scripts, LyCORIS and older diffusers write them: up, down and, for convolutions, mid.

    linear          dW = s up down                      up (O, r), down (r, I)
    convolution     dW = s down x_0 up                  up (O, r, 1, ...), down (r, I, K1, ...)
    Tucker          dW = s mid x_0 up x_1 down^T        up (O, r, 1, ...), down (r, I, 1, ...), mid (r, r, K1, ...)

with s = alpha / r.  DyLoRA writes the same names; it is read at its full rank.
"""

from __future__ import annotations

import math

from tpeft_deploy.algebra import low_rank
from tpeft_deploy.formats.lycoris.dora import change_with_dora
from tpeft_deploy.formats.lycoris.whole import bias_override
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_kohya_lora"]

# Names of the same pair: kohya and LyCORIS; three generations of diffusers.
_PAIRS = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
)
_MID = "lora_mid.weight"
"""Suffixes that follow the module's name without a dot: "attn.to_q_lora.up.weight" belongs to "attn.to_q"."""
_SUFFIXES = frozenset({name for pair in _PAIRS for name in pair} | {_MID, "alpha", "dora_scale", "diff_b"})


@reader(
    "kohya-lora",
    About(
        "kohya sd-scripts, LyCORIS, older diffusers",
        "LoRA, LoCon, DyLoRA, with DoRA",
        "linear, conv",
        "for DoRA and diff_b",
        "low-rank, gain, override",
    ),
    _SUFFIXES,
    marks=(name for pair in _PAIRS for name in pair),
    joined_suffixes={name for name in _SUFFIXES if name.startswith("_")},
)
def read_kohya_lora(module: Module) -> Change:
    """The module's LoRA, LoCon or DyLoRA as a Tucker delta, with a gain if it has a dora_scale."""
    up_name, down_name = next(pair for pair in _PAIRS if any(name in module.tensors for name in pair))
    up, down = module.take(up_name), module.take(down_name)
    mid = module.tensors.pop(_MID, None)
    with module.reporting():
        rank = down.shape[0]
        note = _dylora_note(up, down, module.checkpoint)
    scale, alpha_note = module.take_scale(rank)
    with module.reporting():
        delta = _plain(up, down, scale) if mid is None else _tucker(up, down, mid, scale)
    overrides = bias_override(module)
    return change_with_dora(module, delta, note, alpha_note, overrides=overrides)


def _plain(up: Array, down: Array, scale: float) -> TuckerDelta:
    up = _matrix(up, "up")
    if down.ndim == 2:
        return low_rank(up, down, scale)
    return TuckerDelta(down, (up, *[None] * (down.ndim - 1)), scale)


def _tucker(up: Array, down: Array, mid: Array, scale: float) -> TuckerDelta:
    factors = (_matrix(up, "up"), _matrix(down, "down").T, *[None] * (mid.ndim - 2))
    return TuckerDelta(mid, factors, scale)


def _matrix(tensor: Array, name: str) -> Array:
    """(a, b, 1, ...) as (a, b); raises for a kernel larger than 1, which a reshape would scramble."""
    if math.prod(tensor.shape[2:]) != 1:
        raise ValueError(f"{name} has shape {tensor.shape}; all sizes after the second should be 1")
    return tensor.reshape(tensor.shape[:2])


def _dylora_note(up: Array, down: Array, checkpoint: Checkpoint) -> str | None:
    # Only LyCORIS' DyLoRA writes a convolution's up as a matrix; for linear layers only the metadata records it.
    written = up.ndim == 2 and down.ndim > 2
    if not written and "dylora" not in checkpoint.metadata.get("ss_network_args", "").lower():
        return None
    return "DyLoRA, read at its full rank as LoRA with scale alpha / rank; LyCORIS trains it with alpha / blocks"
