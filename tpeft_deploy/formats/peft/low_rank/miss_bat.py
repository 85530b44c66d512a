"""MiSS of init_weights='bat' as PEFT saves it: each tile of the weight is multiplied by a block (arXiv 2409.15371).

W'[o, i] = W[o, i] + W[o, i] D[o] + D[o] for tiles of size (r, r)        miss_block D (O / r, r, r)
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base, dense_change
from tpeft_deploy.formats.peft.config import is_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import reporting, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-miss-bat"
ABOUT = About("PEFT", "MiSS (init_weights='bat')", "linear", "yes", "dense")
_BLOCK = "miss_block"
SUFFIXES = frozenset({_BLOCK})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether a PEFT file of type MISS with init_weights='bat' has blocks for the module."""
    return is_type(checkpoint, "MISS") and checkpoint.config.get("init_weights") == "bat" and _BLOCK in module.tensors


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W' - W, dense.

    Raises:
        FormatError: no base was given, or the blocks do not fit it.
    """
    weight = base_weight(module, checkpoint, "MiSS")
    stored = take(module, checkpoint, _BLOCK)
    with reporting(module, checkpoint):
        count, size, _ = stored.shape
        if weight.ndim != 2 or stored.shape != (count, size, size) or count * size != len(weight):
            raise ValueError(f"blocks {stored.shape} for a weight of shape {weight.shape}")
        blocks = stored.astype(np.float64)
        tiles = weight.reshape(count, size, -1, size)
        adapted = tiles + np.einsum("oaib,obc->oaic", tiles, blocks) + blocks[:, :, None]
        return change_of_base(module, checkpoint, dense_change(adapted, weight, stored))
