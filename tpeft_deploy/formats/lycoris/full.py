"""LyCORIS' full: the dense change of a weight and of a bias.

    W' = W + diff           b' = b + diff_b

A diff of one axis belongs to a norm's weight.  diff_b occurs beside other formats' tensors too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing, no_scale, reporting
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "added", "bias_override", "matches", "read"]

NAME = "lycoris-full"
ABOUT = About("LyCORIS", "full", "linear, conv, norms", "for biases and norms", "dense, override")
SUFFIXES = frozenset({"diff", "diff_b"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has a dense change of its weight, or a change of its bias alone."""
    return "diff" in module.tensors or set(module.tensors) == {"diff_b"}


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's dense delta, and its bias as an override.

    Raises:
        FormatError: a shape does not fit, the base's bias is needed and no base was given, or a scale was given.
    """
    no_scale(module, checkpoint)
    diff = module.tensors.pop("diff", None)
    target = f"{module.name}.weight"
    bias = bias_override(module, checkpoint)
    if diff is None:
        return Change(overrides=bias)
    if diff.ndim < 2:
        return Change(overrides={target: added(module, checkpoint, "weight", diff), **bias})
    with reporting(module, checkpoint):
        delta = TuckerDelta(diff, (None,) * diff.ndim)
    return Change(deltas={target: delta}, overrides=bias, notes={target: "LyCORIS full: a dense change, kept dense"})


def bias_override(module: Module, checkpoint: Checkpoint) -> Mapping[str, Array]:
    """Pop diff_b: the bias's name -> the base's bias + diff_b; empty if the module has none.

    Raises:
        FormatError: no base was given, or it has no bias of that shape there.
    """
    diff = module.tensors.pop("diff_b", None)
    return {} if diff is None else {f"{module.name}.bias": added(module, checkpoint, "bias", diff)}


def added(module: Module, checkpoint: Checkpoint, tensor: str, difference: Array) -> Array:
    """The base's parameter plus a difference of the same shape, in float32 or wider.

    Raises:
        FormatError: no base was given, or its parameter is missing or has another shape.
    """
    base = base_array(module, checkpoint, tensor, f"the file has only the difference to the base's {tensor}")
    if base.shape != difference.shape:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a difference of shape {base.shape}, as the base's {tensor}",
            got=difference.shape,
            fix="Check that the base is what the adapter was trained on.",
        )
    dtype = np.result_type(np.float32, base.dtype, difference.dtype)
    return (base.astype(np.float64) + difference).astype(dtype)
