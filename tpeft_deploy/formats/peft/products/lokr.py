"""LoKr as PEFT saves it: LyCORIS' tensors, with alpha in adapter_config.json (arXiv 2309.14859, section 3).

    dW = s kron(w1, w2)     w1 = lokr_w1 (a, c), or lokr_w1_a (a, r) lokr_w1_b (r, c)
                            w2 = lokr_w2 (b, d, K1, ...), or lokr_w2_a (b, r) lokr_w2_b (r, d K1 ...),
                            or, with use_effective_conv2d, lokr_t2 (r, r, K1, K2) x_0 lokr_w2_a^T x_1 lokr_w2_b^T

PEFT (0.21.2) differs from LyCORIS in two ways, which are part of the trained change:

- s = alpha / r also if both halves are full, where LyCORIS uses 1; r is then the configuration's.
- For Conv1d with a full w2 (b, d, K) the Kronecker product runs over the last two axes, kron(w1, w2) of shape
  (b, a d, c K), and is then reshaped to (O, I, K).
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import alpha_of, by_pattern, of_type, weight_shape
from tpeft_deploy.formats.products.compact import DENSE, finish, is_dense, widen
from tpeft_deploy.formats.products.kronecker import Half, check_sizes, full, lokr, product, tucker
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, reporting, take
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-lokr"
ABOUT = About("PEFT", "LoKr", "linear, conv 1d and 2d", "for convolutions", "low-rank, dense", types=("LOKR",))
_FIRST, _SECOND, _CORE = "lokr_w1", "lokr_w2", "lokr_t2"
SUFFIXES = frozenset({_FIRST, f"{_FIRST}_a", f"{_FIRST}_b", _SECOND, f"{_SECOND}_a", f"{_SECOND}_b", _CORE})
_SCRAMBLED = "PEFT's Kronecker product of this Conv1d leaves out the kernel's axis, which is read as it was trained"
matches = of_type("LOKR", _FIRST, f"{_FIRST}_a")


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change as a Tucker delta, dense if that is smaller.

    Without a base the weight is assumed to be a matrix if the second half does not show a kernel.

    Raises:
        FormatError: a tensor is missing or does not fit, or the configuration lacks alpha or r or has another rank.
    """
    no_scale(module, checkpoint)
    target = f"{module.name}.weight"
    shape = weight_shape(target, checkpoint)
    with reporting(module, checkpoint):
        first = _half(module, checkpoint, _FIRST, ())
        second = _half(module, checkpoint, _SECOND, () if shape is None else shape[2:])
        if shape is None:
            (a, c), (b, d, *kernel) = first.shape, second.shape
            shape = (a * b, c * d, *kernel)
        scale = _scale(module, checkpoint, first, second)
        if len(shape) == 3 and second.rank is None:
            return Change(deltas={target: _scrambled(first, second, scale, shape)}, notes={target: _SCRAMBLED})
        delta = lokr(first, second, scale=scale, shape=shape)
    return Change(deltas={target: delta}, notes={target: DENSE} if is_dense(delta) else {})


def _half(module: Module, checkpoint: Checkpoint, name: str, kernel: tuple[int, ...]) -> Half:
    if name in module.tensors:
        return full(module.tensors.pop(name))
    left, right = take(module, checkpoint, f"{name}_a"), take(module, checkpoint, f"{name}_b")
    core = module.tensors.pop(_CORE, None) if name == _SECOND else None
    return product(left, right, kernel) if core is None else tucker(core, left, right, kernel or core.shape[2:])


def _scale(module: Module, checkpoint: Checkpoint, first: Half, second: Half) -> float:
    rank = second.rank or first.rank
    if rank is None:
        alpha = by_pattern(checkpoint, "alpha_pattern", module.name, "alpha")
        return alpha / by_pattern(checkpoint, "rank_pattern", module.name, "r")
    return alpha_of(checkpoint, module.name, rank, "alpha") / rank


def _scrambled(first: Half, second: Half, scale: float, shape: tuple[int, ...]) -> TuckerDelta:
    check_sizes(first, second, shape)
    change = np.kron(first.dense()[None], second.dense()).reshape(shape)
    return finish(TuckerDelta(change.astype(widen(second.core).dtype), (None,) * 3, scale), shape, what="a LoKr change")
