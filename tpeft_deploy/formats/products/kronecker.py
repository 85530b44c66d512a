"""LoKr: a Kronecker product of two halves, each full, a matrix product or a Tucker product.

    dW = s * kron(W1, W2)        W1 (a, c), W2 (b, d, K1, ...), O = a b, I = c d

(LyCORIS, arXiv 2309.14859, section 3; PEFT.)  With each half as core and factors, (u1, c1, v1) and (u2, c2, v2), it is
the Tucker form of core kron(c1, c2) and factors kron(u1, u2), kron(v1, v2): its ranks are the products of the halves'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tpeft_deploy.algebra import dense_is_smaller, finish, low_rank, widen
from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["Half", "check_sizes", "full", "lokr", "product", "tucker"]


@dataclass(frozen=True, eq=False)
class Half:
    """One half, core x_0 left x_1 right; None is an identity.

    Args:
        core: (r1, r2, K1, ...).
        left: (a, r1).
        right: (c, r2).
        rank: divisor of alpha; None if the half is stored full.
    """

    core: Array
    left: Array | None = None
    right: Array | None = None
    rank: int | None = None

    @property
    def delta(self) -> TuckerDelta:
        """The half as a Tucker delta."""
        return TuckerDelta(self.core, (self.left, self.right, *[None] * (self.core.ndim - 2)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(a, c, K1, ...)."""
        return self.delta.shape

    def dense(self) -> Array:
        """(a, c, K1, ...), in float64."""
        return self.delta.dense()

    def narrowed(self) -> Half:
        """Absorb factors that make the core larger than the half."""
        narrow = self.delta.narrowed()
        left, right = narrow.factors[:2]
        return Half(narrow.core.astype(self.core.dtype, copy=False), left, right, self.rank)


def full(weight: Array) -> Half:
    """A half stored whole: (a, c) or (b, d, K1, ...)."""
    return Half(widen(weight))


def product(left: Array, right: Array, kernel: tuple[int, ...] = ()) -> Half:
    """A half stored as left (b, r) times right (r, d K1 ...)."""
    left, right, rank = widen(left), widen(right), left.shape[-1]
    if not kernel:
        delta = low_rank(left, right, 1.0)
        return Half(delta.core, delta.factors[0], delta.factors[1], rank)
    try:
        core = right.reshape(right.shape[0], right.shape[1] // math.prod(kernel), *kernel)
    except (ValueError, IndexError) as error:
        raise ShapeError(
            "build a LoKr change", expected=f"a matrix (r, inputs times kernel {kernel})", got=right.shape
        ) from error
    return Half(core, left, None, rank)


def tucker(core: Array, left: Array, right: Array, kernel: tuple[int, ...]) -> Half:
    """A half stored as core (r, r, K1, ...), left (r, b), right (r, d).

    Further core axes of size 1, which PEFT gives to Conv1d, are dropped.
    """
    try:
        core = widen(core).reshape(*core.shape[:2], *kernel)
    except ValueError as error:
        raise ShapeError(
            "build a LoKr change", expected=f"a core (r, r) with the kernel {kernel}", got=core.shape
        ) from error
    return Half(core, widen(left).T, widen(right).T, left.shape[0])


def lokr(first: Half, second: Half, *, scale: float, shape: tuple[int, ...]) -> TuckerDelta:
    """The change s * kron(first, second), of low rank, or dense if that has fewer elements.

    Args:
        first: (a, c).
        second: (b, d, K1, ...).
        scale: factor s.
        shape: shape of the weight, (O, I, K1, ...).

    Raises:
        ShapeError: the halves do not fit each other or the weight.
    """
    if first.core.ndim != 2 or second.core.ndim != len(shape):
        raise ShapeError(
            "build a LoKr change",
            expected=f"a matrix and a tensor of {len(shape)} axes, as the weight is {shape}",
            got=f"{first.core.ndim} and {second.core.ndim} axes",
        )
    kernel = second.core.shape[2:]
    check_sizes(first, second, shape)
    first, second = _narrow(first.narrowed()), second.narrowed()
    ranks = (first.core.shape[0] * second.core.shape[0], first.core.shape[1] * second.core.shape[1], *kernel)
    if dense_is_smaller(ranks, shape):
        core = _kron(first.dense(), second.dense()).astype(second.core.dtype)
        return finish(TuckerDelta(core, (None,) * core.ndim, scale), shape, what="a LoKr change")
    left = _kron_factor(first.left, first.core.shape[0], second.left, second.core.shape[0])
    right = _kron_factor(first.right, first.core.shape[1], second.right, second.core.shape[1])
    delta = TuckerDelta(_kron(first.core, second.core), (left, right, *[None] * len(kernel)), scale)
    return finish(delta, shape, what="a LoKr change")


def check_sizes(first: Half, second: Half, shape: tuple[int, ...]) -> None:
    """Check that the product of two halves has the weight's shape, before it is computed.

    Raises:
        ShapeError: the shapes differ.
    """
    (a, c), (b, d, *kernel) = first.shape, second.shape
    if (a * b, c * d, *kernel) != shape:
        raise ShapeError(
            "build a LoKr change",
            expected=f"a change of the weight's shape {shape}",
            got=(a * b, c * d, *kernel),
            fix="Check that the base is what the adapter was trained on.",
        )


def _narrow(half: Half) -> Half:
    """Write a full matrix (a, c) with an identity on its smaller side and a factor on its larger: smallest ranks."""
    if half.left is not None or half.right is not None:
        return half
    rows, columns = half.core.shape
    if rows <= columns:
        return Half(np.eye(rows, dtype=half.core.dtype), None, half.core.T)
    return Half(np.eye(columns, dtype=half.core.dtype), half.core, None)


def _kron(first: Array, second: Array) -> Array:
    """kron over the first two axes; the kernel is the second's."""
    return np.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def _kron_factor(first: Array | None, first_size: int, second: Array | None, second_size: int) -> Array | None:
    if first is None and second is None:
        return None
    return np.kron(np.eye(first_size) if first is None else first, np.eye(second_size) if second is None else second)
