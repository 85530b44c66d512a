"""Readers of PEFT's elementwise and Kronecker products."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.algebra import DENSE, finish, is_dense, widen
from tpeft_deploy.formats.base.weight_changes import base_weight, change_of_base, dense_delta
from tpeft_deploy.formats.peft.config import alpha_of, by_pattern, stored_transposed, weight_shape
from tpeft_deploy.formats.products.hadamard import loha, loha_tucker
from tpeft_deploy.formats.products.kronecker import Half, check_sizes, full, lokr, product, tucker
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_hira", "read_loha", "read_lokr"]

_HIRA_A, _HIRA_B = "hira_A", "hira_B"
_EMBEDDING_A, _EMBEDDING_B = "hira_embedding_A", "hira_embedding_B"


@reader(
    "peft-hira",
    About("PEFT", "HiRA", "linear, Conv1D, conv 1d to 3d, embedding", "yes", "dense", types=("HIRA",)),
    {_HIRA_A, _HIRA_B, _EMBEDDING_A, _EMBEDDING_B},
)
def read_hira(module: Module) -> Change:
    """HiRA as PEFT saves it: an elementwise product of a low-rank matrix and the base weight (ICLR 2025).

    W' = W + W * (B A)

    layer            tensors                                                       weight
    Linear           hira_A (r, I), hira_B (O, r)                                  (O, I)
    Conv1D           the same                                                      (I, O)
    Conv1d/2d/3d     hira_A (r, I, K1, ...), hira_B (O, r, 1, ...)                 (O, I, K1, ...)
    Embedding        hira_embedding_A (r, N), hira_embedding_B (D, r)              (N, D)
    """
    weight = base_weight(module, "HiRA")
    embedding = _EMBEDDING_A in module.tensors
    down = module.take(_EMBEDDING_A if embedding else _HIRA_A)
    up = module.take(_EMBEDDING_B if embedding else _HIRA_B)
    with module.reporting():
        outputs, inputs = len(up), math.prod(down.shape[1:])
        transposed = embedding or (weight.ndim == 2 and stored_transposed(module, outputs, inputs))
        expected = weight.shape[::-1] if transposed else weight.shape
        if (outputs, *down.shape[1:]) != expected or up.size != outputs * len(down):
            raise ValueError(f"factors {up.shape} and {down.shape} for a weight of shape {weight.shape}")
        product = _hira_product(up.reshape(outputs, -1), down)
        adapted = weight * (1 + (product.T if transposed else product.reshape(weight.shape)))
        return change_of_base(module, dense_delta(adapted, weight, down))


def _hira_product(up: Array, down: Array) -> Array:
    """(O, I K1 ...) in float64."""
    product: Array = up.astype(np.float64) @ down.reshape(len(down), -1).astype(np.float64)
    return product


_HALVES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@reader(
    "peft-loha",
    About("PEFT", "LoHa", "linear, conv 1d and 2d", "for convolutions", "low-rank, dense", types=("LOHA",)),
    {*_HALVES, *_CORES},
    marks={_HALVES[0]},
)
def read_loha(module: Module) -> Change:
    """LoHa as PEFT saves it: LyCORIS' tensors and algebra, with alpha in adapter_config.json (arXiv 2108.06098).

        dW = s (hada_w1_a hada_w1_b) * (hada_w2_a hada_w2_b)        s = alpha / r

    With use_effective_conv2d each half is a Tucker product with the core hada_t1 or hada_t2 (r, r, K1, K2); for Conv1d
    the core has a last axis of size 1.

    Without a base the weight is assumed to be a matrix: the file does not record the kernel of a convolution.
    """
    module.no_scale()
    w1a, w1b, w2a, w2b = (module.take(name) for name in _HALVES)
    target = f"{module.name}.weight"
    cores = [module.take(name) for name in _CORES if _CORES[0] in module.tensors or name in module.tensors]
    with module.reporting():
        rank = w1a.shape[0] if cores else w1a.shape[1]
        scale = alpha_of(module.checkpoint, module.name, rank, "alpha") / rank
        shape = weight_shape(target, module.checkpoint)
        if cores:
            shape = shape or (w1a.shape[1], w1b.shape[1], *cores[0].shape[2:])
            delta = loha_tucker(cores[0], w1a, w1b, cores[1], w2a, w2b, scale=scale, shape=shape)
        else:
            delta = loha(w1a, w1b, w2a, w2b, scale=scale, shape=shape or (w1a.shape[0], w1b.shape[1]))
    return Change(deltas={target: delta}, notes={target: DENSE} if is_dense(delta) else {})


_FIRST, _SECOND, _CORE = "lokr_w1", "lokr_w2", "lokr_t2"
_SCRAMBLED = "PEFT's Kronecker product of this Conv1d leaves out the kernel's axis, which is read as it was trained"


@reader(
    "peft-lokr",
    About("PEFT", "LoKr", "linear, conv 1d and 2d", "for convolutions", "low-rank, dense", types=("LOKR",)),
    {_FIRST, f"{_FIRST}_a", f"{_FIRST}_b", _SECOND, f"{_SECOND}_a", f"{_SECOND}_b", _CORE},
    marks={_FIRST, f"{_FIRST}_a"},
)
def read_lokr(module: Module) -> Change:
    """LoKr as PEFT saves it: LyCORIS' tensors, with alpha in adapter_config.json (arXiv 2309.14859, section 3).

        dW = s kron(w1, w2)     w1 = lokr_w1 (a, c), or lokr_w1_a (a, r) lokr_w1_b (r, c)
                                w2 = lokr_w2 (b, d, K1, ...), or lokr_w2_a (b, r) lokr_w2_b (r, d K1 ...),
                                or, with use_effective_conv2d, lokr_t2 (r, r, K1, K2) x_0 lokr_w2_a^T x_1 lokr_w2_b^T

    PEFT (0.21.2) differs from LyCORIS in two ways, which are part of the trained change:

    - s = alpha / r also if both halves are full, where LyCORIS uses 1; r is then the configuration's.
    - For Conv1d with a full w2 (b, d, K) the Kronecker product runs over the last two axes, kron(w1, w2) of shape
      (b, a d, c K), and is then reshaped to (O, I, K).

    Without a base the weight is assumed to be a matrix if the second half does not show a kernel.
    """
    module.no_scale()
    target = f"{module.name}.weight"
    shape = weight_shape(target, module.checkpoint)
    with module.reporting():
        first = _lokr_half(module, _FIRST, ())
        second = _lokr_half(module, _SECOND, () if shape is None else shape[2:])
        if shape is None:
            (a, c), (b, d, *kernel) = first.shape, second.shape
            shape = (a * b, c * d, *kernel)
        scale = _lokr_scale(module, first, second)
        if len(shape) == 3 and second.rank is None:
            return Change(deltas={target: _scrambled(first, second, scale, shape)}, notes={target: _SCRAMBLED})
        delta = lokr(first, second, scale=scale, shape=shape)
    return Change(deltas={target: delta}, notes={target: DENSE} if is_dense(delta) else {})


def _lokr_half(module: Module, name: str, kernel: tuple[int, ...]) -> Half:
    if name in module.tensors:
        return full(module.tensors.pop(name))
    left, right = module.take(f"{name}_a"), module.take(f"{name}_b")
    core = module.tensors.pop(_CORE, None) if name == _SECOND else None
    return product(left, right, kernel) if core is None else tucker(core, left, right, kernel or core.shape[2:])


def _lokr_scale(module: Module, first: Half, second: Half) -> float:
    rank = second.rank or first.rank
    if rank is None:
        alpha = by_pattern(module.checkpoint, "alpha_pattern", module.name, "alpha")
        return alpha / by_pattern(module.checkpoint, "rank_pattern", module.name, "r")
    return alpha_of(module.checkpoint, module.name, rank, "alpha") / rank


def _scrambled(first: Half, second: Half, scale: float, shape: tuple[int, ...]) -> TuckerDelta:
    check_sizes(first, second, shape)
    change = np.kron(first.dense()[None], second.dense()).reshape(shape)
    return finish(TuckerDelta(change.astype(widen(second.core).dtype), (None,) * 3, scale), shape, what="a LoKr change")
