"""GLoRA as LyCORIS writes it (arXiv 2306.07967): a low-rank change, and one multiplied with the base's weight.

    dW = s (W x_1 (a1 a2)^T + b1 b2)        a1 (I, r), a2 (r, I), b1 (O, r), b2 (r, I, K1, ...), s = alpha / r

The change holds for this W alone; it has rank 2 r if the weight has no kernel, else it is kept dense.
"""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.products.compact import low_rank, widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, reporting, take, take_scale
from tpeft_deploy.tucker import Array, TuckerDelta, mode_product

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "lycoris-glora"
ABOUT = About("LyCORIS", "GLoRA", "linear, conv", "yes", "low-rank, dense")
_MATRICES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
SUFFIXES = frozenset({*_MATRICES, "alpha"})
_RS_LORA = "GLoRA, read with scale alpha / rank; one trained with rs_lora has another scale, which its file omits"


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has GLoRA's first matrix and another; a1 alone may be the name of a layer."""
    return "a1.weight" in module.tensors and any(name in module.tensors for name in _MATRICES[1:])


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's GLoRA as a delta that holds for this base alone.

    Raises:
        FormatError: no base was given, a tensor is missing or does not fit, or alpha is not finite.
    """
    a1, a2, b1, b2 = (widen(take(module, checkpoint, name)) for name in _MATRICES)
    weight = base_array(module, checkpoint, "weight", "GLoRA's change depends on the base's weight")
    with reporting(module, checkpoint):
        rank = a2.shape[0]
    scale, note = take_scale(module, checkpoint, rank)
    with reporting(module, checkpoint):
        delta = _delta(weight, _flat(a1), _flat(a2), _flat(b1), b2, scale)
        if delta.shape != weight.shape:
            raise ValueError(f"a change of shape {delta.shape} for a weight of shape {weight.shape}")
    target = f"{module.name}.weight"
    return Change(deltas={target: delta}, notes={target: "; ".join(text for text in (_RS_LORA, note) if text)})


def _delta(weight: Array, a1: Array, a2: Array, b1: Array, b2: Array, scale: float) -> TuckerDelta:
    dtype = np.result_type(a1, b1, np.float32)
    kernel, inputs = weight.shape[2:], weight.shape[1]
    sizes = a1.shape, a2.shape, b1.shape, b2.shape
    if sizes != ((inputs, len(a2)), (len(a2), inputs), (len(weight), len(b2)), (len(b2), *weight.shape[1:])):
        raise ValueError(f"tensors of shapes {sizes} for a weight of shape {weight.shape}")
    wide = weight.astype(np.float64)
    if math.prod(kernel) == 1 and len(a2) <= inputs:
        through = mode_product(wide, a1.T, 1)  # (O, r, K1, ...)
        left = np.concatenate([_flat(through).astype(dtype), b1], axis=1)
        return low_rank(left, np.concatenate([a2, _flat(b2)]).astype(dtype, copy=False), scale, kernel)
    # (W a1) a2 for a small r, else W (a1 a2), so that no product is larger than the weight or the file.
    changed = (
        TuckerDelta(wide, (None, a2.T @ a1.T, *[None] * len(kernel))).dense()
        if len(a2) > inputs
        else (mode_product(mode_product(wide, a1.T, 1), a2.T, 1))
    )
    dense = changed + mode_product(b2.astype(np.float64), b1, 0)
    return TuckerDelta(dense.astype(dtype), (None,) * dense.ndim, scale)


def _flat(tensor: Array) -> Array:
    """(a, b, 1, ...) as (a, b)."""
    if math.prod(tensor.shape[2:]) != 1:
        raise ValueError(f"a tensor of shape {tensor.shape}; all sizes after the second should be 1")
    return tensor.reshape(tensor.shape[:2])
