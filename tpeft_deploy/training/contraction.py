"""Arithmetic of Tucker factors in torch: building dW, how much that costs, and where training starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["break_even", "contract", "initial_core", "initial_factor"]


def contract(core: Tensor, factors: Mapping[int, Tensor]) -> Tensor:
    """Mode products of a core with some factors: G x_m U_m (Kolda and Bader, SIAM Review 51(3), 2009, section 2.5).

    Args:
        core: (R_o, R_i, R_k1, ...).
        factors: mode -> (mode size, rank); the other modes stay as they are.

    Returns:
        The core with the mode's size at every mode that has a factor.
    """
    # From the last mode: kernel modes are the smallest, and keep the intermediate results small.
    for mode in sorted(factors, reverse=True):
        moved = core.movedim(mode, 0)
        # A matrix product, as tensordot refuses the two types that autocast makes of the steps.
        product = factors[mode] @ moved.reshape(moved.shape[0], -1)
        core = product.reshape(-1, *moved.shape[1:]).movedim(0, mode)
    return core


def break_even(factored: float, dense: float, ranks: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """Number of output positions from which building dW is cheaper than running through the factors.

    Args:
        factored: multiplications per position through the factors; infinite where they cannot be used.
        dense: multiplications per position with dW.
        ranks: of the core, one per mode.
        shape: of the weight, one size per mode.  Kernel modes are absorbed on both ways and count for neither.

    Returns:
        0 when the factors cannot be used, infinity when they never cost more.
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
    """Orthonormal columns, (size, rank), drawn uniformly: the Q of a Gaussian matrix."""
    # Then |dW| = scale * |core|: a learning rate moves layers of every size alike, and no direction of the subspace
    # is favoured.  Against Gaussian factors (kaiming_normal, a=sqrt 5) it reached a lower loss at almost every
    # learning rate tried, on convolutions of 64 channels and on linear layers and embeddings of width 768.
    return nn.init.orthogonal_(torch.empty(size, rank))


def initial_core(ranks: tuple[int, ...], *, zero: bool) -> Tensor:
    """A zero core, which starts training exactly at the base, or a small random one."""
    return torch.zeros(ranks) if zero else 0.1 * torch.randn(ranks)
