"""Choice between low-rank and dense form: a Hadamard or Kronecker product has the product of two ranks.

A LoHa adapter of rank 32 has rank 1024, so for many layers the dense change has fewer elements.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tpeft_deploy.algebra import is_dense
from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["DENSE", "dense_is_smaller", "finish", "is_dense", "low_rank", "widen"]

DENSE = "kept dense, which holds fewer bytes than its low-rank form"  # a Change's note


def dense_is_smaller(ranks: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether dW (O, I, K1, ...) has at most as many elements as core and factors of these ranks.

    A matrix counts as two factors, since its core is absorbed; a rank as large as its mode needs no factor.
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
