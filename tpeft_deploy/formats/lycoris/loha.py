"""LoHa as LyCORIS and sd-scripts write it: an elementwise product of two low-rank changes.

    plain       dW = s (w1_a w1_b) * (w2_a w2_b)        w*_a (O, r), w*_b (r, I K1 ...)
    Tucker      dW = s T1 * T2, Ti = ti x_0 wi_a^T x_1 wi_b^T
                                                        wi_a (r, O), wi_b (r, I), ti (r, r, K1, ...)

with s = alpha / r, applied once as in LyCORIS' forward; its merge_to applies it twice.
"""

from __future__ import annotations

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.lycoris.dora import change_with_dora
from tpeft_deploy.formats.products.compact import DENSE, is_dense
from tpeft_deploy.formats.products.hadamard import loha, loha_tucker
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, reporting, take, take_scale

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "lycoris-loha"
ABOUT = About("LyCORIS, sd-scripts", "LoHa, with DoRA", "linear, conv", "yes", "low-rank, dense, gain")
_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
SUFFIXES = frozenset({*_MATRICES, *_CORES, "alpha", "dora_scale"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has LoHa's first matrix, in a file without a configuration."""
    return "hada_w1_a" in module.tensors and not checkpoint.config


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's LoHa as a Tucker delta, dense if that is smaller, with a gain if it has a dora_scale.

    Raises:
        FormatError: no base was given (needed for the weight's shape); a tensor is missing or does not fit; alpha is
            not finite.
    """
    w1a, w1b, w2a, w2b = (take(module, checkpoint, name) for name in _MATRICES)
    shape = base_array(module, checkpoint, "weight", "LoHa does not state the weight's shape").shape
    tucker = any(name in module.tensors for name in _CORES)
    with reporting(module, checkpoint):
        rank = w1b.shape[0]  # (r, I K1 ...) and (r, I): the rank comes first in both layouts
    scale, note = take_scale(module, checkpoint, rank)
    if tucker:
        t1, t2 = (take(module, checkpoint, name) for name in _CORES)
        with reporting(module, checkpoint):
            delta = loha_tucker(t1, w1a, w1b, t2, w2a, w2b, scale=scale, shape=shape)
    else:
        with reporting(module, checkpoint):
            delta = loha(w1a, w1b, w2a, w2b, scale=scale, shape=shape)
    return change_with_dora(module, checkpoint, delta, DENSE if is_dense(delta) else None, note)
