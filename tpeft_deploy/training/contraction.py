"""Tucker factors in torch: contraction to dW, its cost, and initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["break_even", "contract", "initial_core", "initial_factor"]


def contract(core: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """Multiply a core by some factors: G x_m U_m (Kolda and Bader, SIAM Review 51(3), 2009, section 2.5).

    Args:
        core: (R_o, R_i, R_k1, ...).
        factors: mode -> (mode size, rank); other modes are unchanged.

    Returns:
        The product, with the mode size in place of the rank at every mode with a factor.
    """
    # From the last mode: kernel modes are the smallest, so that intermediate results stay small.
    for mode in sorted(factors, reverse=True):
        moved = core.movedim(mode, 0)
        # A matrix product: tensordot does not accept the two dtypes that occur under autocast.
        product = factors[mode] @ moved.reshape(moved.shape[0], -1)
        core = product.reshape(-1, *moved.shape[1:]).movedim(0, mode)
    return core


def break_even(factored: float, dense: float, ranks: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """Compute the number of output positions above which building dW is cheaper than running through the factors.

    Args:
        factored: multiplications per position through the factors; infinite if they cannot be used.
        dense: multiplications per position with dW.
        ranks: shape of the core.
        shape: shape of the weight.  Kernel modes are absorbed in both cases and not counted.

    Returns:
        0 if the factors cannot be used, infinity if they never cost more.
    """
    if factored <= dense:
        return math.inf
    rank_o, rank_i = ranks[:2]
    size_o, size_i = shape[:2]
    kernel = math.prod(shape[2:])
    build = (rank_i < size_i) * rank_o * rank_i * size_i * kernel + (
        rank_o < size_o
    ) * rank_o * size_i * size_o * kernel
    return build / (factored - dense)


def initial_factor(size: int, rank: int) -> Tensor:
    """Draw a factor with orthonormal columns, (size, rank), uniformly: the Q of a Gaussian matrix."""
    # Then |dW| = scale * |core|, so that one learning rate suits layers of all sizes.  Compared with Gaussian factors
    # (kaiming_normal, a=sqrt 5) the loss was lower at almost every learning rate tried, on convolutions of 64 channels
    # and on linear layers and embeddings of width 768.
    return nn.init.orthogonal_(torch.empty(size, rank))


def initial_core(ranks: tuple[int, ...], *, zero: bool) -> Tensor:
    """Create a zero core, so that dW = 0, or a small random one."""
    return torch.zeros(ranks) if zero else 0.1 * torch.randn(ranks)
