"""PiSSA and OLoRA: inits of LoRA that change the base weight, so that s B A is a change of the changed base.

At injection PEFT moves the first r components of the weight to A and B:

    W' = W - P        P = U_r S_r V_r^T (PiSSA, arXiv 2404.02948), or s Q_r R_r (OLoRA, arXiv 2406.01775)

A file that was saved without conversion still has `init_lora_weights`.  The adapted weight is then W - P + s B A, and P
is computed from the base in the same way as in PEFT.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["subtract_initial"]


def subtract_initial(module: Module, checkpoint: Checkpoint, delta: TuckerDelta, *, transposed: bool) -> TuckerDelta:
    """The change s B A - P for PiSSA and OLoRA, of rank 2 r; s B A for every other init.

    Args:
        module: module that is read.
        checkpoint: checkpoint of the module.
        delta: s B A as factors of a weight.
        transposed: True if the weight is stored as (I, O).

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
