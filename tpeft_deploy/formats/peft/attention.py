"""LoRA on torch's MultiheadAttention as PEFT saves it: both projections, in_proj as one matrix.

    in_proj_weight   (3 E, E)   s B A       <module>.lora_A.weight (r, E), lora_B.weight (3 E, r)
    out_proj.weight  (E, E)     2 s B A     <module>.base_layer.out_proj.lora_A.weight, lora_B.weight

The factor 2 is a property of PEFT (0.21.2): MultiheadAttention.merge, which forward calls too, adds the change of
out_proj and then calls out_proj.merge, which adds it again.  The adapter was trained with it.
"""

from __future__ import annotations

from dataclasses import replace

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import is_type, matrix_delta
from tpeft_deploy.formats.peft.low_rank.lora import scale_of
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, reporting, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-lora-attention"
ABOUT = About("PEFT", "LoRA", "MultiheadAttention", "yes", "low-rank")
_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
SUFFIXES = frozenset({_A, _B, _BIAS})
_OUT = ".base_layer.out_proj"
_TWICE = "PEFT adds the change of MultiheadAttention's out_proj twice, in training as well, so it is read as 2 s B A"


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module is a MultiheadAttention of the base, or the out_proj inside one; precedes plain LoRA."""
    return is_type(checkpoint, "LORA") and _A in module.tensors and (_is_out(module) or _is_in(module, checkpoint))


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The change of one projection.

    Raises:
        FormatError: a tensor is missing or does not fit, the adapter has biases, or the configuration lacks lora_alpha.
    """
    no_scale(module, checkpoint)
    if _BIAS in module.tensors:
        raise FormatError(
            doing(module, checkpoint),
            expected="LoRA without biases on MultiheadAttention",
            got="lora_bias, which PEFT leaves out of one projection and not of the other",
            fix="Train again with lora_bias=False.",
        )
    down, up = take(module, checkpoint, _A), take(module, checkpoint, _B)
    # PEFT uses the attention's rank and alpha for its out_proj.
    attention = module.name.removesuffix(".out_proj") if _is_out(module) else module.name
    with reporting(module, checkpoint):
        delta = matrix_delta(up, down, scale_of(checkpoint, attention, down.shape[0]))
    if not _is_out(module):
        return Change(deltas={f"{module.name}.in_proj_weight": delta})
    target = f"{module.name}.weight"
    return Change(deltas={target: replace(delta, scale=2 * delta.scale)}, notes={target: _TWICE})


def _is_out(module: Module) -> bool:
    return module.key.endswith(_OUT)


def _is_in(module: Module, checkpoint: Checkpoint) -> bool:
    return checkpoint.base is not None and f"{module.name}.in_proj_weight" in checkpoint.base.weights
