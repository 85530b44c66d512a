"""DeLoRA as PEFT saves it: LoRA with a bounded norm of the change (arXiv 2503.18225).

    dW = B diag(lambda / (r |a_i| |b_i|)) A diag(n)

delora_A (r, I) with rows a_i, delora_B (O, r) with columns b_i, delora_lambda (1,), delora_w_norm (I,) as n: the norms
of the base's columns at the start of training.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import diagonal_delta, of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, reporting, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-delora"
ABOUT = About("PEFT", "DeLoRA", "linear", "no", "low-rank", types=("DELORA",))
_A, _B, _LAMBDA, _NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
SUFFIXES = frozenset({_A, _B, _LAMBDA, _NORM})
_SMALLEST = 1e-4  # PEFT clamps the norms to this value
matches = of_type("DELORA", _A)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, with the bounded diagonal as the core.

    Raises:
        FormatError: a tensor is missing or does not fit.
    """
    no_scale(module, checkpoint)
    down, up, bound, norm = (take(module, checkpoint, name) for name in (_A, _B, _LAMBDA, _NORM))
    with reporting(module, checkpoint):
        rows = np.maximum(np.linalg.norm(down.astype(np.float64), axis=1), _SMALLEST)
        columns = np.maximum(np.linalg.norm(up.astype(np.float64), axis=0), _SMALLEST)
        if rows.shape != columns.shape or norm.shape != down.shape[1:]:
            raise ValueError(f"factors {up.shape} and {down.shape}, and norms {norm.shape}")
        values = (bound.reshape(-1) / len(rows) / (rows * columns)).astype(np.promote_types(up.dtype, np.float32))
        delta = diagonal_delta(up, values, down * norm, 1.0)
    return Change(deltas={f"{module.name}.weight": delta})
