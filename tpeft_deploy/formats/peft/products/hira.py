"""HiRA as PEFT saves it: an elementwise product of a low-rank matrix and the base weight (ICLR 2025).

W' = W + W * (B A)

layer            tensors                                                       weight
Linear           hira_A (r, I), hira_B (O, r)                                  (O, I)
Conv1D           the same                                                      (I, O)
Conv1d/2d/3d     hira_A (r, I, K1, ...), hira_B (O, r, 1, ...)                 (O, I, K1, ...)
Embedding        hira_embedding_A (r, N), hira_embedding_B (D, r)              (N, D)
"""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base, dense_change
from tpeft_deploy.formats.peft.config import of_type, stored_transposed
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-hira"
ABOUT = About("PEFT", "HiRA", "linear, Conv1D, conv 1d to 3d, embedding", "yes", "dense", types=("HIRA",))
_A, _B = "hira_A", "hira_B"
_EMBEDDING_A, _EMBEDDING_B = "hira_embedding_A", "hira_embedding_B"
SUFFIXES = frozenset({_A, _B, _EMBEDDING_A, _EMBEDDING_B})
matches = of_type("HIRA", *SUFFIXES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W * (B A), dense.

    Raises:
        FormatError: no base was given, or a tensor is missing or does not fit it.
    """
    weight = base_weight(module, checkpoint, "HiRA")
    embedding = _EMBEDDING_A in module.tensors
    down = take(module, checkpoint, _EMBEDDING_A if embedding else _A)
    up = take(module, checkpoint, _EMBEDDING_B if embedding else _B)
    with reporting(module, checkpoint):
        outputs, inputs = len(up), math.prod(down.shape[1:])
        transposed = embedding or (weight.ndim == 2 and stored_transposed(module, checkpoint, outputs, inputs))
        expected = weight.shape[::-1] if transposed else weight.shape
        if (outputs, *down.shape[1:]) != expected or up.size != outputs * len(down):
            raise ValueError(f"factors {up.shape} and {down.shape} for a weight of shape {weight.shape}")
        product = _product(up.reshape(outputs, -1), down)
        adapted = weight * (1 + (product.T if transposed else product.reshape(weight.shape)))
        return change_of_base(module, checkpoint, dense_change(adapted, weight, down))


def _product(up: Array, down: Array) -> Array:
    """(O, I K1 ...) in float64."""
    product: Array = up.astype(np.float64) @ down.reshape(len(down), -1).astype(np.float64)
    return product
