"""Finding the factors by which an exporter multiplied a weight's rows: a norm folded into the layer before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tpeft_deploy.tucker import Array

__all__ = ["can_unfuse", "row_factors"]

_BOUNDS = {4: 1e-5, 8: 1e-5, 2: 1e-3}  # by bytes: what rounding once leaves, with room to spare
_LEAST = 8  # numbers beyond one per row that must agree: one number is parallel to any other


def can_unfuse(node: ir.Node) -> bool:
    """Whether a layer is of a form that can be taken apart: its bias a constant, its products not scaled."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    scales = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    return (bias is None or bias.const_value is not None) and scales == (1.0, 1.0)


def row_factors(stored: Array, weight: Array, node: ir.Node, *, turned: bool) -> Array | None:
    """The s for which stored = diag(s) weight, by least squares row by row, or None when there is none.

    Args:
        stored: the initializer's values, as they stand in the file.
        weight: the original ones.
        node: the layer that uses them: a row is all that leads to one of its output channels.
        turned: whether the file holds the weight transposed.

    Returns:
        (O,) float64; None also where a row of the weight is all zero, as its factor is anything then.
    """
    fused = _rows(stored.T if turned else stored, node, turned=turned).astype(np.float64)
    own = _rows(weight, node, turned=turned).astype(np.float64)
    if own.shape[1] < 2 or own.shape[0] * (own.shape[1] - 1) < _LEAST:
        return None
    squares = np.einsum("ij,ij->i", own, own)
    if not squares.all():
        return None
    factors: Array = np.einsum("ij,ij->i", fused, own) / squares
    bound = _BOUNDS.get(min(stored.dtype.itemsize, weight.dtype.itemsize), 0.0)
    left = np.linalg.norm(fused - factors[:, None] * own, axis=1)
    return factors if np.all(left <= bound * np.linalg.norm(fused, axis=1)) else None


def _rows(weight: Array, node: ir.Node, *, turned: bool) -> Array:
    """A weight (in torch's layout) as one row per output channel of the layer that uses it."""
    if node.op_type == "Conv":
        return weight.reshape(len(weight), -1)
    if node.op_type == "ConvTranspose":
        groups = node.attributes.get_int("group", 1)
        inputs, outputs = len(weight) // groups, weight.shape[1]
        split = weight.reshape(groups, inputs, outputs, -1).swapaxes(1, 2)
        return split.reshape(groups * outputs, -1)
    outputs_first = turned or (node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0)))
    return weight if outputs_first else weight.T
