"""GLoRA as PEFT saves it: weight and bias are rescaled and shifted, each by a small tensor (arXiv 2306.07967).

W' = W + W * A + B        b' = b + b * D + E + W C

Each of A to E is a product Xd Xu, a tensor X that broadcasts, or absent (a buffer `zeros`): config_A_B, config_C and
config_D_E decide.  A layer without a bias has neither C, D nor E.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base, dense_change
from tpeft_deploy.formats.peft.config import base_bias, of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-glora"
ABOUT = About("PEFT", "GLoRA", "linear", "yes", "dense, override", types=("GLORA",))
SUFFIXES = frozenset(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros"))
matches = of_type("GLORA", *SUFFIXES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W' - W, and the new bias if the layer has one.

    Raises:
        FormatError: no base was given, or a tensor is missing or does not fit it.
    """
    weight = base_weight(module, checkpoint, "GLoRA")
    like = next(iter(module.tensors.values()))
    with reporting(module, checkpoint):
        if weight.ndim != 2:
            raise ValueError(f"a weight of shape {weight.shape}, where GLoRA changes linear layers")
        outputs, inputs = weight.shape
        scale, shift = (_path(module, checkpoint, path, (outputs, inputs)) for path in "AB")
        through = _path(module, checkpoint, "C", (inputs, 1))
        bias_scale, bias_shift = (_path(module, checkpoint, path, (outputs,)) for path in "DE")
        bias = base_bias(module, checkpoint, "GLoRA changes the base's bias as well")
        if bias is not None:
            bias = bias + bias * bias_scale + bias_shift + (weight @ np.broadcast_to(through, (inputs, 1)))[:, 0]
            bias = bias.astype(np.promote_types(like.dtype, np.float32))
        delta = dense_change(weight + weight * scale + shift, weight, like)
        return change_of_base(module, checkpoint, delta, bias=bias)


def _path(module: Module, checkpoint: Checkpoint, path: str, shape: tuple[int, ...]) -> Array:
    """One of A to E in float64, of a shape that broadcasts to `shape`."""
    zeros = module.tensors.pop(f"glora_{path}.zeros", None)
    if zeros is not None:
        if zeros.any():
            raise ValueError(f"glora_{path}.zeros, which is not zero")
        return np.zeros(1)
    if f"glora_{path}.Xd" not in module.tensors:
        whole = take(module, checkpoint, f"glora_{path}.X").astype(np.float64)
        if whole.shape not in {(1,), (*shape[:1], *[1] * (len(shape) - 1))}:
            raise ValueError(f"glora_{path}.X of shape {whole.shape}, which does not fit {shape}")
        return whole
    left, right = (take(module, checkpoint, f"glora_{path}.{part}").astype(np.float64) for part in ("Xd", "Xu"))
    if (*left.shape[:1], *right.shape[1:]) != shape or left.shape[1:] != right.shape[:1]:
        raise ValueError(f"glora_{path} of shapes {left.shape} and {right.shape}, which do not make {shape}")
    return np.asarray(left @ right)
