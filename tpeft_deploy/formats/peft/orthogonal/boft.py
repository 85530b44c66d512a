"""BOFT as PEFT saves it: inputs are rotated by a butterfly of blocks, and outputs rescaled (arXiv 2311.06243).

y = s (W (x M) ) + b        W' = diag(s) W M^T        M = M_m .. M_1, M_i = P_i blockdiag(R_i1 .. R_in) P_i^T

boft_R (m, n, b, b) of which R = (I - Q) (I + Q)^-1 with Q = (boft_R - boft_R^T) / 2; boft_s (O, 1), or (1, O) for a
convolution, where M is (I K1 K2, I K1 K2).  The change of a convolution follows the base layer; PEFT's forward ignores
dilation and padding_mode.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, cayley, change_of_base, dense_change, rotate_inputs
from tpeft_deploy.formats.peft.config import of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-boft"
ABOUT = About("PEFT", "BOFT", "linear, conv 2d", "yes", "dense", types=("BOFT",))
_BLOCKS, _SCALE = "boft_R", "boft_s"
SUFFIXES = frozenset({_BLOCKS, _SCALE})
matches = of_type("BOFT", _BLOCKS)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W' - W.

    Raises:
        FormatError: no base was given, or a tensor is missing or does not fit it.
    """
    weight = base_weight(module, checkpoint, "BOFT")
    values, scale = take(module, checkpoint, _BLOCKS), take(module, checkpoint, _SCALE)
    with reporting(module, checkpoint):
        flat = weight.reshape(len(weight), -1)
        factors, count, size, _ = values.shape
        if factors == 0 or count * size != flat.shape[1] or scale.size != len(weight):
            raise ValueError(f"blocks {values.shape} and {scale.size} scales for a weight of shape {weight.shape}")
        skew = values.astype(np.float64)
        rotations = cayley((skew - skew.swapaxes(-1, -2)) / 2)
        for level, blocks in enumerate(rotations):
            order = _butterfly(count, size, level, factors)
            rotated = rotate_inputs(flat[:, np.argsort(order)], blocks)
            flat = rotated[:, order]
        adapted = scale.reshape(-1, 1) * flat
        return change_of_base(module, checkpoint, dense_change(adapted, weight, values))


def _butterfly(count: int, size: int, level: int, factors: int) -> Array:
    """Permutation of the inputs at a level of the butterfly: halves of blocks, even ones first."""
    inputs = np.arange(count * size)
    if factors == 1:
        return inputs
    if size % 2 or count % 2**level:
        raise ValueError(f"{count} blocks of size {size} for a butterfly of {factors} levels")
    halves = inputs.reshape(-1, 2 ** (level + 1), size // 2)
    return np.concatenate([halves[:, ::2], halves[:, 1::2]], axis=1).reshape(-1)
