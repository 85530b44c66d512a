"""PiSSA and OLoRA: inits of LoRA that move the base weight, so that the adapter is not a change of the base itself.

At injection PEFT takes the first r components of the weight, puts them into A and B and subtracts them:

    W' = W - P        P = U_r S_r V_r^T (PiSSA, arXiv 2404.02948), or s Q_r R_r (OLoRA, arXiv 2406.01775)

A file that was saved without conversion still says so in `init_lora_weights`.  The adapted weight is then
W - P + s B A, and P is computed from the base as PEFT computes it.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["subtract_initial"]


def subtract_initial(module: Module, checkpoint: Checkpoint, delta: TuckerDelta, *, transposed: bool) -> TuckerDelta:
    """The change s B A - P for PiSSA and OLoRA, of rank 2 r; the change itself for every other init.

    Args:
        module: the module.
        checkpoint: its checkpoint.
        delta: s B A as factors of a weight.
        transposed: whether the weight is stored as (I, O).

    Raises:
        FormatError: no base was given to compute P from.
    """
    init = checkpoint.config.get("init_lora_weights")
    if not isinstance(init, str) or init.lower() not in {"pissa", "olora"}:
        return delta
    weight = base_array(
        module, checkpoint, "weight", f"init_lora_weights={init!r} subtracts a part of the base's weight"
    )
    if init.lower() == "olora" and transposed:
        raise FormatError(doing(module, checkpoint), expected="OLoRA on a Linear layer", got="a transformers Conv1D")
    if weight.shape != delta.shape:
        raise FormatError(doing(module, checkpoint), expected=f"a change of shape {weight.shape}", got=delta.shape)
    rank = delta.ranks[0]
    left, right, factor = _pissa(weight, rank, delta.scale) if init.lower() == "pissa" else _olora(weight, rank)
    core = np.zeros((rank + left.shape[1],) * 2, delta.core.dtype)
    core[:rank, :rank] = delta.core
    core[rank:, rank:] = -factor * np.eye(left.shape[1])
    up, down = delta.factors
    if up is None or down is None:
        raise FormatError(doing(module, checkpoint), expected="two factors", got="one")
    factors = (np.hstack([up, left.astype(up.dtype)]), np.hstack([down, right.astype(down.dtype)]))
    return TuckerDelta(core, factors, delta.scale)


def _pissa(weight: Array, rank: int, scale: float) -> tuple[Array, Array, float]:
    """P / s as U_r sqrt(S_r), V_r sqrt(S_r) and 1 / s."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, right[:rank].T * root, 1 / scale


def _olora(weight: Array, rank: int) -> tuple[Array, Array, float]:
    """P / s as Q_r, R_r^T and 1."""
    left, right = np.linalg.qr(weight.astype(np.float64))
    return left[:, :rank], right[:rank].T, 1.0
