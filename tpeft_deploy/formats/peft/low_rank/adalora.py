"""AdaLoRA as PEFT saves it: a low-rank change with a rank that was pruned in training (arXiv 2303.10512).

    dW = s B diag(E) A        lora_B (O, r), lora_E (r, 1), lora_A (r, I), or (r, I K1 K2) for Conv2d
    s = lora_alpha / (init_r + 1e-5)

PEFT divides by the initial rank, which only `init_r` of adapter_config.json records.  Its `r` is unused, and its
`rank_pattern` holds masks.
"""

from __future__ import annotations

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import diagonal_delta, number, of_type, stored_transposed, weight_shape
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, reporting, take
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "MAY_BE_EMPTY", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-adalora"
ABOUT = About("PEFT", "AdaLoRA", "linear, Conv1D, conv 2d", "for convolutions", "low-rank", types=("ADALORA",))
_A, _E, _B = "lora_A", "lora_E", "lora_B"
SUFFIXES = MAY_BE_EMPTY = frozenset({_A, _E, _B})  # if training pruned the whole rank
matches = of_type("ADALORA", _E)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change; none if training pruned its whole rank.

    Raises:
        FormatError: a tensor is missing or does not fit, or the configuration lacks lora_alpha or init_r.
    """
    no_scale(module, checkpoint)
    down, values, up = (take(module, checkpoint, name) for name in (_A, _E, _B))
    target = f"{module.name}.weight"
    scale = _scale(checkpoint)
    if values.shape != (down.shape[0], 1):
        raise FormatError(doing(module, checkpoint), expected=f"lora_E of shape {(down.shape[0], 1)}", got=values.shape)
    if not values.size:
        return Change(notes={target: "AdaLoRA pruned its whole rank: nothing changes"})
    with reporting(module, checkpoint):
        delta = _delta(module, checkpoint, down, values, up, scale)
    return Change(deltas={target: delta})


def _scale(checkpoint: Checkpoint) -> float:
    rank = number(checkpoint.config, "init_r", checkpoint.source)
    alpha = number(checkpoint.config, "lora_alpha", checkpoint.source)
    return (alpha if alpha > 0 else rank) / (rank + 1e-5)  # as in AdaLoraLayer.update_layer


def _delta(module: Module, checkpoint: Checkpoint, down: Array, values: Array, up: Array, scale: float) -> TuckerDelta:
    shape = weight_shape(f"{module.name}.weight", checkpoint)
    if shape is not None and len(shape) > 2:
        core = (values * down).reshape(-1, *shape[1:])
        return TuckerDelta(core, (up, *[None] * (len(shape) - 1)), scale)
    transposed = stored_transposed(module, checkpoint, up.shape[0], down.shape[1])
    return diagonal_delta(up, values[:, 0], down, scale, transposed=transposed)
