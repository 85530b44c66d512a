"""LoHa: an elementwise product of two low-rank changes (FedPara, arXiv 2108.06098; LyCORIS, PEFT).

    dW = s * (W1a W1b) * (W2a W2b)

Its rank is the product of both ranks: with fs the face-splitting (row-wise Kronecker) product,
(P Q) * (R S) = fs(P, R) fs(Q^T, S^T)^T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tpeft_deploy.algebra import dense_is_smaller, finish, widen
from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["loha", "loha_tucker"]

_CHECK_BASE = "Check that the base is what the adapter was trained on."


def loha(w1a: Array, w1b: Array, w2a: Array, w2b: Array, *, scale: float, shape: tuple[int, ...]) -> TuckerDelta:
    """The change s * (W1a W1b) * (W2a W2b), of rank r1 r2, or dense if that has fewer elements.

    Args:
        w1a, w2a: (O, r1), (O, r2).
        w1b, w2b: (r1, I K1 ...), (r2, I K1 ...).
        scale: factor s.
        shape: shape of the weight, (O, I, K1, ...).

    Raises:
        ShapeError: the tensors do not fit each other or the weight.
    """
    _require_matrices(w1a=w1a, w1b=w1b, w2a=w2a, w2b=w2b)
    for up, down in ((w1a, w1b), (w2a, w2b)):
        _require_sizes((up.shape[0], down.shape[1]), (shape[0], math.prod(shape[1:])), shape)
    w1a, w1b, w2a, w2b = (widen(w) for w in (w1a, w1b, w2a, w2b))
    rank = w1a.shape[1] * w2a.shape[1]
    ranks = (rank, rank) if len(shape) == 2 else (rank, *shape[1:])
    with _reporting():
        if dense_is_smaller(ranks, shape):
            core = (w1a.astype(np.float64) @ w1b) * (w2a.astype(np.float64) @ w2b)
            return _dense(core.reshape(shape), scale, w1a)
        up, down = _face_split(w1a, w2a), _face_split(w1b.T, w2b.T)
        if len(shape) == 2:
            delta = TuckerDelta(np.eye(rank, dtype=up.dtype), (up, down), scale)
        else:
            delta = TuckerDelta(down.T.reshape(rank, *shape[1:]), (up, *[None] * (len(shape) - 1)), scale)
    return finish(delta, shape, what="a LoHa change")


def loha_tucker(
    t1: Array,
    w1a: Array,
    w1b: Array,
    t2: Array,
    w2a: Array,
    w2b: Array,
    *,
    scale: float,
    shape: tuple[int, ...],
) -> TuckerDelta:
    """The change s * T1 * T2, where each half is a Tucker product Ti = ti x_0 Wia^T x_1 Wib^T.

    Args:
        t1, t2: (r, r, K1, ...); further axes of size 1, which PEFT gives to Conv1d, are dropped.
        w1a, w2a: (r, O).
        w1b, w2b: (r, I).
        scale: factor s.
        shape: shape of the weight, (O, I, K1, ...).

    Raises:
        ShapeError: the tensors do not fit each other or the weight.
    """
    _require_matrices(w1a=w1a, w1b=w1b, w2a=w2a, w2b=w2b)
    for left, right in ((w1a, w1b), (w2a, w2b)):
        _require_sizes((left.shape[1], right.shape[1]), shape[:2], shape)
    t1, w1a, w1b, t2, w2a, w2b = (widen(w) for w in (t1, w1a, w1b, t2, w2a, w2b))
    with _reporting():
        t1, t2 = (t.reshape(*t.shape[:2], *shape[2:]) for t in (t1, t2))
        ranks = (t1.shape[0] * t2.shape[0], t1.shape[1] * t2.shape[1], *shape[2:])
        if dense_is_smaller(ranks, shape):
            return finish(_dense(_half(t1, w1a, w1b) * _half(t2, w2a, w2b), scale, t1), shape, what="a LoHa change")
        delta = _product((t1, w1a, w1b), (t2, w2a, w2b), scale, shape)
    return finish(delta, shape, what="a LoHa change")


@contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ShapeError("build a LoHa change", problem=str(error), fix=_CHECK_BASE) from error


def _face_split(left: Array, right: Array) -> Array:
    """(d, r1), (d, r2) -> (d, r1 r2): the Kronecker product of each pair of rows."""
    return (left[:, :, None] * right[:, None, :]).reshape(left.shape[0], -1)


def _product(
    first: tuple[Array, Array, Array], second: tuple[Array, Array, Array], scale: float, shape: tuple[int, ...]
) -> TuckerDelta:
    """The product of two halves (t, wa, wb); a mode with a rank product beyond its size is multiplied out before."""
    out = [a.shape[0] * b.shape[0] > size for a, b, size in zip(first[1:], second[1:], shape, strict=False)]
    kernel = [None] * (len(shape) - 2)
    cores = [
        TuckerDelta(t, (wa.T if out[0] else None, wb.T if out[1] else None, *kernel)).absorb().core
        for t, wa, wb in (first, second)
    ]
    rows, columns = ("i" if out[0] else "ik"), ("j" if out[1] else "jl")
    core = np.einsum(f"ij...,{rows[-1]}{columns[-1]}...->{rows}{columns}...", *cores)
    factors = [None if out[m] else _face_split(first[m + 1].T, second[m + 1].T) for m in (0, 1)]
    ranks = [shape[m] if factor is None else factor.shape[1] for m, factor in enumerate(factors)]
    return TuckerDelta(core.reshape(*ranks, *shape[2:]).astype(first[0].dtype), (*factors, *kernel), scale)


def _half(t: Array, wa: Array, wb: Array) -> Array:
    return TuckerDelta(t, (wa.T, wb.T, *[None] * (t.ndim - 2))).dense()


def _dense(change: Array, scale: float, like: Array) -> TuckerDelta:
    return TuckerDelta(change.astype(like.dtype), (None,) * change.ndim, scale)


def _require_sizes(got: tuple[int, ...], expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Check shapes before any array of these sizes is allocated."""
    if got != expected:
        raise ShapeError(
            "build a LoHa change",
            expected=f"a change of the weight's shape {shape}",
            got=got,
            fix=_CHECK_BASE,
        )


def _require_matrices(**tensors: Array) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ShapeError("build a LoHa change", expected=f"{name} as a matrix", got=f"shape {tensor.shape}")
