"""LoHa as PEFT saves it: LyCORIS' tensors and algebra, with alpha in adapter_config.json (arXiv 2108.06098).

    dW = s (hada_w1_a hada_w1_b) * (hada_w2_a hada_w2_b)        s = alpha / r

With use_effective_conv2d each half is a Tucker product with the core hada_t1 or hada_t2 (r, r, K1, K2); for Conv1d the
core has a last axis of size 1.
"""

from __future__ import annotations

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import alpha_of, of_type, weight_shape
from tpeft_deploy.formats.products.compact import DENSE, is_dense
from tpeft_deploy.formats.products.hadamard import loha, loha_tucker
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, reporting, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-loha"
ABOUT = About("PEFT", "LoHa", "linear, conv 1d and 2d", "for convolutions", "low-rank, dense", types=("LOHA",))
_HALVES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
SUFFIXES = frozenset({*_HALVES, *_CORES})
matches = of_type("LOHA", _HALVES[0])


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change as a Tucker delta, dense if that is smaller.

    Without a base the weight is assumed to be a matrix: the file does not record the kernel of a convolution.

    Raises:
        FormatError: a tensor is missing or does not fit, or the configuration lacks alpha or has another rank.
    """
    no_scale(module, checkpoint)
    w1a, w1b, w2a, w2b = (take(module, checkpoint, name) for name in _HALVES)
    target = f"{module.name}.weight"
    cores = [take(module, checkpoint, name) for name in _CORES if _CORES[0] in module.tensors or name in module.tensors]
    with reporting(module, checkpoint):
        rank = w1a.shape[0] if cores else w1a.shape[1]
        scale = alpha_of(checkpoint, module.name, rank, "alpha") / rank
        shape = weight_shape(target, checkpoint)
        if cores:
            shape = shape or (w1a.shape[1], w1b.shape[1], *cores[0].shape[2:])
            delta = loha_tucker(cores[0], w1a, w1b, cores[1], w2a, w2b, scale=scale, shape=shape)
        else:
            delta = loha(w1a, w1b, w2a, w2b, scale=scale, shape=shape or (w1a.shape[0], w1b.shape[1]))
    return Change(deltas={target: delta}, notes={target: DENSE} if is_dense(delta) else {})
