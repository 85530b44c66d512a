"""Readers of LyCORIS' products: GLoRA, LoHa and LoKr."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.algebra import DENSE, is_dense, low_rank, widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.lycoris.dora import change_with_dora
from tpeft_deploy.formats.products.hadamard import loha, loha_tucker
from tpeft_deploy.formats.products.kronecker import Half, full, lokr, product, tucker
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader, without_config
from tpeft_deploy.tucker import Array, TuckerDelta, mode_product

__all__ = ["read_glora", "read_loha", "read_lokr"]

_GLORA_MATRICES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_RS_LORA = "GLoRA, read with scale alpha / rank; one trained with rs_lora has another scale, which its file omits"


def _is_glora(module: Module) -> bool:
    """Whether the module has GLoRA's first matrix and another; a1 alone may be the name of a layer."""
    return "a1.weight" in module.tensors and any(name in module.tensors for name in _GLORA_MATRICES[1:])


@reader(
    "lycoris-glora",
    About("LyCORIS", "GLoRA", "linear, conv", "yes", "low-rank, dense"),
    {*_GLORA_MATRICES, "alpha"},
    matches=_is_glora,
)
def read_glora(module: Module) -> Change:
    """GLoRA as LyCORIS writes it (arXiv 2306.07967): a low-rank change, and one multiplied with the base's weight.

        dW = s (W x_1 (a1 a2)^T + b1 b2)        a1 (I, r), a2 (r, I), b1 (O, r), b2 (r, I, K1, ...), s = alpha / r

    The change holds for this W alone; it has rank 2 r if the weight has no kernel, else it is kept dense.
    """
    a1, a2, b1, b2 = (widen(module.take(name)) for name in _GLORA_MATRICES)
    weight = module.base_array("weight", "GLoRA's change depends on the base's weight")
    with module.reporting():
        rank = a2.shape[0]
    scale, note = module.take_scale(rank)
    with module.reporting():
        delta = _glora_delta(weight, _flat(a1), _flat(a2), _flat(b1), b2, scale)
        if delta.shape != weight.shape:
            raise ValueError(f"a change of shape {delta.shape} for a weight of shape {weight.shape}")
    target = f"{module.name}.weight"
    return Change(deltas={target: delta}, notes={target: "; ".join(text for text in (_RS_LORA, note) if text)})


def _glora_delta(weight: Array, a1: Array, a2: Array, b1: Array, b2: Array, scale: float) -> TuckerDelta:
    dtype = np.result_type(a1, b1, np.float32)
    kernel, inputs = weight.shape[2:], weight.shape[1]
    sizes = a1.shape, a2.shape, b1.shape, b2.shape
    if sizes != ((inputs, len(a2)), (len(a2), inputs), (len(weight), len(b2)), (len(b2), *weight.shape[1:])):
        raise ValueError(f"tensors of shapes {sizes} for a weight of shape {weight.shape}")
    wide = weight.astype(np.float64)
    if math.prod(kernel) == 1 and len(a2) <= inputs:
        through = mode_product(wide, a1.T, 1)  # (O, r, K1, ...)
        left = np.concatenate([_flat(through).astype(dtype), b1], axis=1)
        return low_rank(left, np.concatenate([a2, _flat(b2)]).astype(dtype, copy=False), scale, kernel)
    # (W a1) a2 for a small r, else W (a1 a2), so that no product is larger than the weight or the file.
    changed = (
        TuckerDelta(wide, (None, a2.T @ a1.T, *[None] * len(kernel))).dense()
        if len(a2) > inputs
        else (mode_product(mode_product(wide, a1.T, 1), a2.T, 1))
    )
    dense = changed + mode_product(b2.astype(np.float64), b1, 0)
    return TuckerDelta(dense.astype(dtype), (None,) * dense.ndim, scale)


def _flat(tensor: Array) -> Array:
    """(a, b, 1, ...) as (a, b)."""
    if math.prod(tensor.shape[2:]) != 1:
        raise ValueError(f"a tensor of shape {tensor.shape}; all sizes after the second should be 1")
    return tensor.reshape(tensor.shape[:2])


_LOHA_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@reader(
    "lycoris-loha",
    About("LyCORIS, sd-scripts", "LoHa, with DoRA", "linear, conv", "yes", "low-rank, dense, gain"),
    {*_LOHA_MATRICES, *_CORES, "alpha", "dora_scale"},
    marks={"hada_w1_a"},
    matches=without_config,
)
def read_loha(module: Module) -> Change:
    """LoHa as LyCORIS and sd-scripts write it: an elementwise product of two low-rank changes.

        plain       dW = s (w1_a w1_b) * (w2_a w2_b)        w*_a (O, r), w*_b (r, I K1 ...)
        Tucker      dW = s T1 * T2, Ti = ti x_0 wi_a^T x_1 wi_b^T
                                                            wi_a (r, O), wi_b (r, I), ti (r, r, K1, ...)

    with s = alpha / r, applied once as in LyCORIS' forward; its merge_to applies it twice.
    """
    w1a, w1b, w2a, w2b = (module.take(name) for name in _LOHA_MATRICES)
    shape = module.base_array("weight", "LoHa does not state the weight's shape").shape
    tucker = any(name in module.tensors for name in _CORES)
    with module.reporting():
        rank = w1b.shape[0]  # (r, I K1 ...) and (r, I): the rank comes first in both layouts
    scale, note = module.take_scale(rank)
    if tucker:
        t1, t2 = (module.take(name) for name in _CORES)
        with module.reporting():
            delta = loha_tucker(t1, w1a, w1b, t2, w2a, w2b, scale=scale, shape=shape)
    else:
        with module.reporting():
            delta = loha(w1a, w1b, w2a, w2b, scale=scale, shape=shape)
    return change_with_dora(module, delta, DENSE if is_dense(delta) else None, note)


_STARTS = ("lokr_w1", "lokr_w1_a")
_CORE = "lokr_t2"
_FULL = "LoKr of two full halves, read with scale 1; LyCORIS' rs_lora trains these with another, which its file omits"


@reader(
    "lycoris-lokr",
    About("LyCORIS, sd-scripts", "LoKr, with DoRA", "linear, conv", "yes", "low-rank, dense, gain"),
    frozenset(
        {*_STARTS, "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", _CORE, "alpha", "dora_scale"},
    ),
    marks=_STARTS,
    matches=without_config,
)
def read_lokr(module: Module) -> Change:
    """LoKr as LyCORIS and sd-scripts write it: a Kronecker product, each half full or factored.

        dW = s kron(w1, w2)     w1 = lokr_w1 (a, c), or lokr_w1_a (a, r) lokr_w1_b (r, c)
                                w2 = lokr_w2 (b, d, K1, ...), or lokr_w2_a (b, r) lokr_w2_b (r, d K1 ...),
                                or, Tucker, lokr_t2 (r, r, K1, ...) x_0 lokr_w2_a^T (r, b) x_1 lokr_w2_b^T (r, d)

    with s = alpha / r, applied once as in LyCORIS' forward; its merge_to applies it twice.  With both halves full there
    is no rank, and s is 1 for any alpha.
    """
    shape = module.base_array("weight", "LoKr does not state the weight's shape").shape
    first = _lokr_half(module, "lokr_w1", ())
    second = _lokr_half(module, "lokr_w2", shape[2:])
    scale, note = _lokr_scale(module, first, second)
    with module.reporting():
        delta = lokr(first, second, scale=scale, shape=shape)
    return change_with_dora(module, delta, DENSE if is_dense(delta) else None, note)


def _lokr_half(module: Module, name: str, kernel: tuple[int, ...]) -> Half:
    if name in module.tensors:
        return full(module.tensors.pop(name))
    left, right = module.take(f"{name}_a"), module.take(f"{name}_b")
    core = module.tensors.pop(_CORE, None) if name == "lokr_w2" else None
    with module.reporting():
        return product(left, right, kernel) if core is None else tucker(core, left, right, kernel)


def _lokr_scale(module: Module, first: Half, second: Half) -> tuple[float, str | None]:
    ranks = {half.rank for half in (first, second) if half.rank is not None}
    if not ranks:
        # Trainers write placeholders such as 1e10 as alpha, which LyCORIS, sd-scripts and ComfyUI ignore.
        module.no_scale()
        return 1.0, None if module.tensors.pop("alpha", None) is None else _FULL
    if len(ranks) > 1:
        raise FormatError(module.doing, expected="both halves of one rank", got=f"ranks {sorted(ranks)}")
    return module.take_scale(ranks.pop())
