"""DEFT as PEFT saves it: a subspace of the outputs is removed from the weight and replaced.

W' = W + Q (s R - P^T W)        deft_P (O, r), deft_R (r, I); s = alpha / r, or 1 without alpha

decomposition_method defines Q and P: deft_P and its positive part (relu), or for both the orthonormal basis of its QR
decomposition (qr), with the signs of Householder reflections.  `para` only removes, and has no deft_R.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base
from tpeft_deploy.formats.peft.config import matrix_delta, number, of_type, stored_transposed
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-deft"
ABOUT = About("PEFT", "DEFT", "linear, Conv1D", "yes", "low-rank", types=("DEFT",))
_P, _R = "deft_P", "deft_R"
SUFFIXES = frozenset({_P, _R})
matches = of_type("DEFT", _P)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of rank r.

    Raises:
        FormatError: no base was given, a tensor is missing or does not fit it, or the configuration is not known.
    """
    weight = base_weight(module, checkpoint, "DEFT")
    stored = take(module, checkpoint, _P)
    filled = None if checkpoint.config.get("para") else take(module, checkpoint, _R)
    with reporting(module, checkpoint):
        outputs, rank = stored.shape
        transposed = stored_transposed(module, checkpoint, outputs, weight.size // max(1, outputs))
        matrix = weight.T if transposed else weight
        shapes = [tensor.shape for tensor in (stored, filled) if tensor is not None]
        if weight.ndim != 2 or shapes != [(len(matrix), rank), (rank, matrix.shape[1])][: len(shapes)]:
            raise ValueError(f"tensors of shapes {shapes} for a weight of shape {weight.shape}")
        left, right = _sides(module, checkpoint, stored.astype(np.float64))
        if rank > outputs and checkpoint.config.get("decomposition_method") == "relu":
            return change_of_base(module, checkpoint, _dense(checkpoint, weight, stored, filled, transposed=transposed))
        inner = -(right.T @ matrix)
        if filled is not None:
            inner += _scale(checkpoint, rank) * filled.astype(np.float64)
        dtype = np.promote_types(stored.dtype, np.float32)
        delta = matrix_delta(left.astype(dtype), inner.astype(dtype), 1.0, transposed=transposed)
        return change_of_base(module, checkpoint, delta)


def _dense(
    checkpoint: Checkpoint, weight: Array, stored: Array, filled: Array | None, *, transposed: bool
) -> TuckerDelta:
    """Dense change, for relu with a rank above the number of outputs: P^T W would be larger than weight and file."""
    matrix = weight.T if transposed else weight
    basis = stored.astype(np.float64)
    change = -(basis @ np.maximum(basis, 0).T) @ matrix
    if filled is not None:
        change += _scale(checkpoint, len(filled)) * (basis @ filled.astype(np.float64))
    stored_change = (change.T if transposed else change).astype(np.promote_types(stored.dtype, np.float32))
    return TuckerDelta(stored_change, (None, None))


def _scale(checkpoint: Checkpoint, rank: int) -> float:
    return number(checkpoint.config, "alpha", checkpoint.source) / rank if checkpoint.config.get("alpha") else 1.0


def _sides(module: Module, checkpoint: Checkpoint, basis: Array) -> tuple[Array, Array]:
    method = checkpoint.config.get("decomposition_method")
    if method == "relu":
        return basis, np.maximum(basis, 0)
    if method != "qr":
        raise FormatError(
            doing(module, checkpoint),
            expected="relu or qr as decomposition_method in adapter_config.json",
            got=repr(method),
            fix="Save the adapter again with save_pretrained.",
        )
    orthonormal = np.asarray(np.linalg.qr(basis)[0])
    if orthonormal.shape != basis.shape:
        raise ValueError(f"deft_P of shape {basis.shape}, which has more columns than rows")
    return orthonormal, orthonormal
