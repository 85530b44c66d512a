"""Exact algebra of Tucker deltas: sums, padding, and the forms that other tools read.

Every function preserves dW: dense() before and after agree to float64 rounding.  Modes are in torch order
(O, I, K1, ...) as in `tucker`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = [
    "DENSE",
    "LowRankPair",
    "combine",
    "dense_nbytes",
    "dense_is_smaller",
    "densify",
    "finish",
    "is_dense",
    "is_zero",
    "low_rank",
    "low_rank_pair",
    "of_rank",
    "pad_ranks",
    "smaller",
    "widen",
]


DENSE = "kept dense, which holds fewer bytes than its low-rank form"  # note on a weight of an adapter
_LARGE = 2**20  # elements; the cost of smaller products is negligible
_ROWS = 64  # rows converted to float64 at a time
_SPARE = 8  # columns of a random sketch beyond the rank looked for


class LowRankPair(NamedTuple):
    """dW.reshape(O, -1) = b @ a.reshape(R, -1), with the scale in `a`; both float64."""

    a: Array  # (R, I, K1, ...)
    b: Array  # (O, R)


def combine(deltas: Sequence[TuckerDelta], weights: Sequence[float] | None = None) -> TuckerDelta:
    """Compute the exact weighted sum of changes of one weight: sum_n w_n dW_n.

    Factors are concatenated, [U_m^1 U_m^2 ...], and the cores become the blocks of a block-diagonal core, so ranks add
    up.  If a mode is an identity for one of the deltas, the factors of the others are absorbed there: the blocks then
    share that mode, and it keeps its size.

    Args:
        deltas: at least one, all of one shape.
        weights: one per delta; default 1 for all.

    Raises:
        ShapeError: no deltas, shapes that differ, or the numbers of weights and deltas differ.
    """
    weights = [1.0] * len(deltas) if weights is None else weights
    shapes = sorted({delta.shape for delta in deltas})
    if len(shapes) != 1 or len(weights) != len(deltas):
        raise ShapeError(
            "add Tucker deltas",
            expected="changes of one shape, with one weight each",
            got=f"{len(deltas)} changes of shapes {', '.join(map(str, shapes)) or 'none'}, {len(weights)} weights",
        )
    modes = range(len(shapes[0]))
    deltas = [delta.narrowed() if _outgrows(delta) else delta for delta in deltas]
    shared = [mode for mode in modes if any(delta.factors[mode] is None for delta in deltas)]
    blocks = [delta.absorb(shared) for delta in deltas]
    sizes = [shapes[0][mode] if mode in shared else sum(block.ranks[mode] for block in blocks) for mode in modes]
    core = np.zeros(sizes)
    start = [0] * len(sizes)
    for block, weight in zip(blocks, weights, strict=True):
        place = tuple(slice(start[mode], start[mode] + block.ranks[mode]) for mode in modes)
        # Added, not assigned: if every mode is an identity, all blocks overlap.
        core[place] += weight * block.scale * block.core
        start = [0 if mode in shared else start[mode] + block.ranks[mode] for mode in modes]
    factors = tuple(None if mode in shared else _side_by_side(blocks, mode) for mode in modes)
    return TuckerDelta(core, factors)


def pad_ranks(delta: TuckerDelta, ranks: Sequence[int]) -> TuckerDelta:
    """Zero-pad the core and every factor of a delta to larger ranks.

    Args:
        delta: delta to pad.
        ranks: one per mode, none smaller than the delta's.  An identity mode that grows becomes an explicit (d, R)
            factor.

    Raises:
        ShapeError: a rank is smaller than the delta's, or the numbers of ranks and modes differ.
    """
    grow = [rank - present for rank, present in zip(ranks, delta.ranks, strict=False)]
    if len(ranks) != len(delta.ranks) or min(grow) < 0:
        raise ShapeError("pad the ranks of a Tucker delta", expected=f"at least {delta.ranks}", got=tuple(ranks))
    factors: list[Array | None] = []
    for mode, (factor, more) in enumerate(zip(delta.factors, grow, strict=True)):
        if factor is None and more:
            factor = np.eye(delta.ranks[mode], dtype=delta.core.dtype)  # noqa: PLW2901 - the identity, spelt out
        factors.append(None if factor is None else np.pad(factor, ((0, 0), (0, more))))
    return replace(delta, core=np.pad(delta.core, [(0, more) for more in grow]), factors=tuple(factors))


def low_rank_pair(delta: TuckerDelta) -> LowRankPair:
    """Write a delta as a LoRA pair: a Tucker change is a LoRA of rank R_o.

    B = U_0 and A = s G x_1 U_1 x_2 U_2 ...; if the other side has the smaller rank (R_i of a matrix, I K1 .. of a
    kernel), the core is absorbed in B instead.
    """
    delta = delta.narrowed()
    scaled = replace(delta, core=delta.scale * delta.core.astype(np.float64), scale=1.0)
    outputs, *rest = delta.shape
    other = scaled.ranks[1] if scaled.core.ndim == 2 else math.prod(rest)
    if scaled.ranks[0] <= other:
        up = delta.factors[0]
        b = np.eye(outputs) if up is None else up.astype(np.float64)
        return LowRankPair(scaled.absorb(range(1, scaled.core.ndim)).core, b)
    if scaled.core.ndim == 2:
        down = delta.factors[1]
        a = np.eye(delta.shape[1]) if down is None else down.T.astype(np.float64)
        return LowRankPair(a, scaled.absorb([0]).core)
    return LowRankPair(np.eye(other).reshape(other, *rest), scaled.absorb().core.reshape(outputs, other))


def dense_is_smaller(ranks: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether dW (O, I, K1, ...) has at most as many elements as core and factors of these ranks.

    A Hadamard or Kronecker product has the product of two ranks: a LoHa of rank 32 has rank 1024, so for many layers
    the dense change has fewer elements.  A matrix counts as two factors, since its core is absorbed; a rank as large
    as its mode needs no factor.
    """
    ranks = tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))
    if len(shape) == 2:
        return min(ranks) * sum(shape) >= math.prod(shape)
    factors = sum(size * rank for size, rank in zip(shape, ranks, strict=True) if size != rank)
    return math.prod(ranks) + factors >= math.prod(shape)


def widen(array: Array) -> Array:
    """Widen to at least float32, so that products of float16 tensors do not round to float16."""
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def low_rank(up: Array, down: Array, scale: float, shape: tuple[int, ...] = ()) -> TuckerDelta:
    """Build the delta s * up down of a matrix, without an identity core larger than dW for a large rank.

    Args:
        up: (O, R).
        down: (R, I).
        scale: factor s.
        shape: sizes of 1 after (O, I), for a convolution with a kernel of 1.

    Raises:
        ShapeError: the factors do not fit each other.
    """
    if not down.ndim == up.ndim == 2 or up.shape[1] != down.shape[0]:
        raise ShapeError("build a low-rank change", expected="factors (O, r) and (r, I)", got=(up.shape, down.shape))
    rank, kernel = down.shape[0], [None] * len(shape)
    if rank > min(up.shape[0], down.shape[1]):
        return TuckerDelta(down.reshape(*down.shape, *shape), (up, None, *kernel), scale)
    return TuckerDelta(np.eye(rank, dtype=down.dtype).reshape(rank, rank, *shape), (up, down.T, *kernel), scale)


def finish(delta: TuckerDelta, shape: tuple[int, ...], *, what: str) -> TuckerDelta:
    """Check the shape of a delta and absorb every factor that is no narrower than its mode.

    Raises:
        ShapeError: the delta does not have the weight's shape.
    """
    if delta.shape != shape:
        raise ShapeError(
            f"build {what}",
            expected=f"a change of the weight's shape {shape}",
            got=delta.shape,
            fix="Check that the base is what the adapter was trained on.",
        )
    wide = [m for m, factor in enumerate(delta.factors) if factor is not None and factor.shape[1] >= factor.shape[0]]
    if not wide:
        return delta
    absorbed = delta.absorb(wide)
    return replace(absorbed, core=absorbed.core.astype(delta.core.dtype))


def is_dense(delta: TuckerDelta) -> bool:
    """Whether the delta has no factors, so that the core is dW / scale."""
    return all(factor is None for factor in delta.factors)


def is_zero(delta: TuckerDelta) -> bool:
    """Whether the scale, the core or a factor is zero, so that dW is zero."""
    parts = [delta.core, *(factor for factor in delta.factors if factor is not None)]
    return delta.scale == 0.0 or not all(part.any() for part in parts)


def dense_nbytes(delta: TuckerDelta) -> int:
    """Bytes of dW in the core's dtype."""
    return math.prod(delta.shape) * delta.core.dtype.itemsize


def densify(delta: TuckerDelta) -> TuckerDelta:
    """Turn a delta into a core without factors, summed in float64 and rounded once to the core's dtype.

    Unlike `dense` it holds no float64 array as large as dW or its factors, so that reading a file with dense changes
    needs memory of a few times the file's size.
    """
    dtype = delta.core.dtype
    up, *others = delta.factors
    if delta.core.ndim == 2 and others[0] is not None and _is_identity(delta.core):
        inner = others[0].T
    else:
        if not is_dense(replace(delta, factors=(None, *others))):
            up, *others = (delta := delta.narrowed()).factors
        inner = delta.core if is_dense(replace(delta, factors=(None, *others))) else _absorb_inner(delta)
    whole = inner.reshape(inner.shape[0], -1)
    core = np.empty((whole.shape[0] if up is None else up.shape[0], whole.shape[1]), dtype)
    for start in range(0, core.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        core[rows] = delta.scale * (whole[rows].astype(np.float64) if up is None else _product(up[rows], whole))
    return TuckerDelta(core.reshape(delta.shape), (None,) * delta.core.ndim)


def smaller(delta: TuckerDelta) -> TuckerDelta:
    """Return the delta if core and factors take fewer bytes than dW, else `densify` of it."""
    if is_dense(delta) or delta.nbytes < dense_nbytes(delta):
        return delta
    return densify(delta)


def of_rank(delta: TuckerDelta, rank: int) -> TuckerDelta | None:
    """Factor mode 0 of a dense change that has at most this rank, up to rounding to its dtype.

    A LoRA whose change was kept dense has the rank of its factors. A random sketch of `rank` columns spans them, at the
    cost of two products instead of a decomposition of the whole change (Halko et al., SIAM Review 53(2), 2011).

    Args:
        delta: change without factors.
        rank: largest R_o of the result.

    Returns:
        Change of rank R_o = `rank`, in float64; None if the change has a larger rank.
    """
    whole = delta.core.reshape(len(delta.core), -1).astype(np.float64)
    columns = min(rank + _SPARE, *whole.shape)
    basis, _ = np.linalg.qr(whole @ np.random.default_rng(0).standard_normal((whole.shape[1], columns)))
    left, values, right = np.linalg.svd(basis.T @ whole, full_matrices=False)
    up, core = basis @ left[:, :rank], values[:rank, None] * right[:rank]
    if np.linalg.norm(whole - up @ core) > 4 * np.finfo(delta.core.dtype).eps * np.linalg.norm(whole):
        return None
    return TuckerDelta(core.reshape(-1, *delta.shape[1:]), (up, *delta.factors[1:]), delta.scale)


def _is_identity(core: Array) -> bool:
    rank = core.shape[0]
    return core.shape == (rank, rank) and np.count_nonzero(core) == rank and bool((core.diagonal() == 1).all())


def _outgrows(delta: TuckerDelta) -> bool:
    """Whether a product with some of the factors may be far larger than dW and than core and factors."""
    largest = math.prod(max(rank, size) for rank, size in zip(delta.ranks, delta.shape, strict=True))
    return largest > max(_LARGE, math.prod(delta.shape), 2 * delta.parameters)


def _absorb_inner(delta: TuckerDelta) -> Array:
    return delta.absorb(range(1, delta.core.ndim)).core


def _product(left: Array, right: Array) -> Array:
    """left @ right in float64, converting a block of `right` at a time."""
    total = np.zeros((left.shape[0], right.shape[1]))
    for start in range(0, right.shape[0], _ROWS):
        block = slice(start, start + _ROWS)
        total += left[:, block].astype(np.float64) @ right[block].astype(np.float64)
    return total


def _side_by_side(deltas: Sequence[TuckerDelta], mode: int) -> Array:
    return np.concatenate([factor for delta in deltas if (factor := delta.factors[mode]) is not None], axis=1)
