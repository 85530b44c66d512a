"""IA3 as LyCORIS writes it (arXiv 2205.05638): each output or each input channel of a weight is rescaled.

    W' = W (1 + weight)     weight (n,), or (1, n, 1, ...) for a convolution; on_input selects the channels

The bias is not rescaled, as in LyCORIS' forward.
"""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing, no_scale, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "lycoris-ia3"
ABOUT = About("LyCORIS", "IA3", "linear, conv", "yes", "gain")
SUFFIXES = frozenset({"weight", "on_input"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has `on_input`."""
    return "on_input" in module.tensors


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The weight's gain, 1 + weight.

    Raises:
        FormatError: no base was given (needed for the number of axes); the channels do not fit it; or a scale
            was given.
    """
    no_scale(module, checkpoint)
    on_input = take(module, checkpoint, "on_input")
    learnt = take(module, checkpoint, "weight")
    shape = base_array(module, checkpoint, "weight", "IA3 names channels of the base's weight").shape
    if on_input.size != 1 or float(on_input.reshape(())) not in {0.0, 1.0}:
        raise FormatError(doing(module, checkpoint), expected="on_input 0 or 1", got=on_input.tolist())
    axis = int(on_input.reshape(()))
    channels = shape[axis] if len(shape) > axis else None
    if learnt.size != channels or math.prod(learnt.shape) != max(learnt.shape, default=1):
        raise _misfit(module, checkpoint, learnt, axis, shape)
    dtype = np.promote_types(learnt.dtype, np.float32)
    gain = (1 + learnt.astype(np.float64)).astype(dtype)
    return Change(gains={f"{module.name}.weight": gain.reshape([-1 if a == axis else 1 for a in range(len(shape))])})


def _misfit(module: Module, checkpoint: Checkpoint, learnt: Array, axis: int, shape: tuple[int, ...]) -> FormatError:
    return FormatError(
        doing(module, checkpoint),
        expected=f"one number for each of the {('outputs', 'inputs')[axis]} of a weight of shape {shape}",
        got=f"shape {learnt.shape}",
        fix="Check the base; on a grouped convolution LyCORIS' IA3 cannot act on the inputs.",
    )
