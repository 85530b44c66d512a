"""The change of one weight as a Tucker decomposition.

    dW = scale * G x_0 U_0 x_1 U_1 x_2 U_2 ...

(FLoRA, arXiv 2405.14739, equation 6; mode product as in Kolda and Bader, SIAM Review 51(3), 2009, section 2.5.)
Modes are in torch order: O output channels, I input channels per group, then the kernel K1 K2 K3.  A linear
weight has 2 modes, Conv1d 3, Conv2d 4, Conv3d 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpeft_deploy.errors import ShapeError

__all__ = ["Array", "TuckerDelta", "is_finite", "mode_product"]

Array = NDArray[Any]


def is_finite(array: Array) -> bool:
    """Whether no value of a floating point array is NaN or infinite."""
    return bool(np.logical_and.reduce(np.isfinite(array), axis=None))  # what all() does, without its Python


def mode_product(tensor: Array, matrix: Array, mode: int) -> Array:
    """Multiply every mode-`mode` fibre of a tensor by a matrix.

    Args:
        tensor: (d_0, ..., r, ..., d_n) with size r at `mode`.
        matrix: (d, r).

    Returns:
        The tensor with size d at `mode`, in the common dtype of both.
    """
    moved = np.moveaxis(tensor, mode, 0)
    product = matrix @ moved.reshape(moved.shape[0], -1)
    return np.moveaxis(product.reshape(matrix.shape[0], *moved.shape[1:]), 0, mode)


@dataclass(frozen=True, eq=False)
class TuckerDelta:
    """Core, one factor per mode, and a scale: the low-rank change of one weight.

    Args:
        core: (R_o, R_i, R_k1, ...), floating point, at least 2 modes.
        factors: one per mode, (mode size, rank) with rank equal to the core's size at that mode; `None` is the
            identity, for which the mode size is the core's size.
        scale: multiplies the whole change; finite.

    Raises:
        ShapeError: the number of factors differs from the core's modes, or a factor's rank from the core's size.
        ValueError: an array is not floating point, or a value is not finite.
    """

    core: Array
    factors: tuple[Array | None, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        arrays = {"core": self.core} | {f"factor {m}": f for m, f in enumerate(self.factors) if f is not None}
        if any(0 in array.shape for array in arrays.values()):
            raise ShapeError("build a Tucker delta", expected="ranks and sizes of at least 1", got=self.core.shape)
        if self.core.ndim < 2 or len(self.factors) != self.core.ndim:
            raise ShapeError(
                "build a Tucker delta",
                expected="a core of at least 2 modes and one factor (or None) per mode",
                got=f"a core of shape {self.core.shape} and {len(self.factors)} factors",
            )
        for mode, factor in enumerate(self.factors):
            if factor is not None and (factor.ndim != 2 or factor.shape[1] != self.core.shape[mode]):
                raise ShapeError(
                    f"build a Tucker delta, factor of mode {mode}",
                    expected=f"shape (mode size, {self.core.shape[mode]}), as the core is {self.core.shape}",
                    got=factor.shape,
                )
        for name, array in arrays.items():
            if array.dtype.kind != "f":
                raise ValueError(f"Tucker {name}: expected a floating point array, got {array.dtype}")
            if not is_finite(array):
                raise ValueError(f"Tucker {name}: holds NaN or infinity")
        if not (math.isfinite(self.scale) if type(self.scale) is float else np.isfinite(self.scale)):
            raise ValueError(f"Tucker scale: expected a finite number, got {self.scale}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes: (O, I, K1, ...)."""
        sizes = zip(self.core.shape, self.factors, strict=True)
        return tuple([size if factor is None else factor.shape[0] for size, factor in sizes])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank per mode: (R_o, R_i, R_k1, ...)."""
        return self.core.shape

    @property
    def rank(self) -> int:
        """Largest rank of the factors of both channel modes; the least size of the core there if neither has one."""
        return max((len(own.T) for own in self.factors[:2] if own is not None), default=min(self.core.shape[:2]))

    @property
    def parameters(self) -> int:
        """Number of elements of core and factors."""
        return self.core.size + sum(f.size for f in self.factors if f is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of core and factors."""
        return self.core.nbytes + sum([f.nbytes for f in self.factors if f is not None])

    def absorb(self, modes: Iterable[int] | None = None) -> TuckerDelta:
        """Multiply the factors of some modes (all by default) into the core, in float64, leaving identities.

        The change stays the same: mode products along different modes commute.  Products that make the core smaller
        are computed first.

        Args:
            modes: modes to absorb.
        """
        chosen = sorted(range(self.core.ndim) if modes is None else modes, key=lambda m: not self._is_wide(m))
        core, factors = self.core.astype(np.float64), list(self.factors)
        for mode in chosen:
            factor = factors[mode]
            if factor is not None:
                core = mode_product(core, factor.astype(np.float64), mode)
                factors[mode] = None
        return replace(self, core=core, factors=tuple(factors))

    def narrowed(self) -> TuckerDelta:
        """Absorb each factor with a rank above the size of its mode, so that no product is larger than dW."""
        wide = [mode for mode in range(self.core.ndim) if self._is_wide(mode)]
        return self.absorb(wide) if wide else self

    def _is_wide(self, mode: int) -> bool:
        factor = self.factors[mode]
        return factor is not None and factor.shape[1] > factor.shape[0]

    def norm(self) -> float:
        """Frobenius norm of dW, computed without dW: U = QR with orthonormal Q, so only R affects the norm."""
        core = self.core.astype(np.float64)
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                core = mode_product(core, np.asarray(np.linalg.qr(factor.astype(np.float64), mode="r")), mode)
        return abs(self.scale) * float(np.linalg.norm(core))

    def dense(self) -> Array:
        """Dense dW as a float64 array of shape (O, I, K1, ...)."""
        # From the last mode to the first: the largest product then comes last and is already contiguous.
        narrow = self.narrowed()
        core = self.scale * narrow.core.astype(np.float64)
        for mode in reversed(range(core.ndim)):
            factor = narrow.factors[mode]
            if factor is not None:
                core = mode_product(core, factor.astype(np.float64), mode)
        return np.ascontiguousarray(core)
