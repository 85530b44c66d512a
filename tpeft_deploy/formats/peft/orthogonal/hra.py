"""HRA as PEFT saves it: the weight is reflected r times, which is a change of rank r (arXiv 2405.17484).

W' = W (I - 2 u_1 u_1^T) .. (I - 2 u_r u_r^T) = W - (W U) T U^T        hra_u (I, r), or (I K1 K2, r) for a convolution

u_i are the normalised columns of hra_u, and T = (I / 2 + triu(U^T U, 1))^-1 (the compact WY form of Schreiber and Van
Loan, 1989).  With apply_GS the columns are orthogonalised first, so that T = 2 I.  The change of a convolution follows
the base layer; PEFT's forward ignores dilation and padding_mode.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base, dense_change
from tpeft_deploy.formats.peft.config import matrix_delta, of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import reporting, take
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-hra"
ABOUT = About("PEFT", "HRA", "linear, conv 2d", "yes", "low-rank", types=("HRA",))
_VECTORS = "hra_u"
SUFFIXES = frozenset({_VECTORS})
matches = of_type("HRA", _VECTORS)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of rank r.

    Raises:
        FormatError: no base was given, or the vectors do not fit it or are zero.
    """
    weight = base_weight(module, checkpoint, "HRA")
    stored = take(module, checkpoint, _VECTORS)
    with reporting(module, checkpoint):
        flat = weight.reshape(len(weight), -1)
        if stored.ndim != 2 or len(stored) != flat.shape[1]:
            raise ValueError(f"vectors of shape {stored.shape} for a weight of shape {weight.shape}")
        vectors = _unit(stored.astype(np.float64), orthogonal=bool(checkpoint.config.get("apply_GS")))
        if vectors.shape[1] >= len(vectors):
            return change_of_base(module, checkpoint, dense_change(_reflected(flat, vectors), weight, stored))
        return change_of_base(module, checkpoint, _low_rank(weight, vectors, stored))


def _low_rank(weight: Array, vectors: Array, like: Array) -> TuckerDelta:
    gram = vectors.T @ vectors
    triangle = np.linalg.inv(np.eye(len(gram)) / 2 + np.triu(gram, 1))
    up, down = _apart(-(weight.reshape(len(weight), -1) @ vectors) @ triangle, vectors)
    dtype = np.promote_types(like.dtype, np.float32)
    core = down.T.reshape(-1, *weight.shape[1:]).astype(dtype)
    if weight.ndim == 2:
        return matrix_delta(up.astype(dtype), core, 1.0)
    return TuckerDelta(core, (up.astype(dtype), *[None] * (weight.ndim - 1)))


def _apart(up: Array, down: Array) -> tuple[Array, Array]:
    """Rewrite the product with orthogonal columns.

    Training starts from pairs of reflections that cancel: rounded to float32, two large columns would lose the small
    difference between them.
    """
    (left, first), (right, second) = np.linalg.qr(up), np.linalg.qr(down)
    before, sizes, after = np.linalg.svd(first @ second.T)
    root = np.sqrt(sizes)
    rank = len(root)
    return left @ (before[:, :rank] * root), right @ (after[:rank].T * root)


def _reflected(weight: Array, vectors: Array) -> Array:
    for vector in vectors.T:
        weight = weight - 2 * np.outer(weight @ vector, vector)
    return weight


def _unit(vectors: Array, *, orthogonal: bool) -> Array:
    """Normalise the columns; optionally orthogonalise them, from first to last."""
    norms = np.linalg.norm(vectors, axis=0)
    if not norms.all() or not np.isfinite(norms).all():
        raise ValueError("a vector of length zero, or too long")
    units: Array = vectors / norms
    if not orthogonal:
        return units
    basis, triangle = np.linalg.qr(units)
    if basis.shape != units.shape or np.abs(triangle.diagonal()).min() < 1e-6:
        raise ValueError("linearly dependent vectors, which apply_GS cannot make orthogonal")
    return np.asarray(basis)
