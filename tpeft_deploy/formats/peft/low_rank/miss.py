"""MiSS as PEFT saves it: inputs are summed in strides of r, then multiplied by one small matrix (arXiv 2409.15371).

    dW = D^T S        miss_block D (r, O), S (r, I) = [I_r I_r ...] cut to I columns

With init_weights='mini' D is (r, mini_r) and repeated along the outputs.  'bat' multiplies by the base weight: see
`miss_bat`.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import matrix_delta, of_type
from tpeft_deploy.formats.peft.dense import misfit
from tpeft_deploy.formats.products.compact import DENSE
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, no_scale, reporting, take
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-miss"
ABOUT = About("PEFT", "MiSS", "linear", "yes", "low-rank", types=("MISS",))
_BLOCK = "miss_block"
SUFFIXES = frozenset({_BLOCK})
matches = of_type("MISS", _BLOCK)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of rank r.

    Raises:
        FormatError: no base was given (needed for the number of inputs), or the block does not fit it.
    """
    no_scale(module, checkpoint)
    block = take(module, checkpoint, _BLOCK)
    shape = base_array(module, checkpoint, "weight", "MiSS does not record the number of inputs of a layer").shape
    if block.ndim != 2 or len(shape) != 2 or shape[0] % block.shape[1]:
        expected = f"a block (r, {shape[0]}), or one that repeats to it, for a weight {shape}"
        raise misfit(module, checkpoint, expected, block.shape)
    with reporting(module, checkpoint):
        outputs, inputs = shape
        block = block[:inputs]  # rows beyond the inputs have no effect
        rank = block.shape[0]
        up = np.tile(block, outputs // block.shape[1]).T
        if rank >= min(outputs, inputs):
            change = np.tile(up, -(-inputs // rank))[:, :inputs]
            target = f"{module.name}.weight"
            return Change(deltas={target: TuckerDelta(change, (None, None))}, notes={target: DENSE})
        sums = np.tile(np.eye(rank, dtype=block.dtype), -(-inputs // rank))[:, :inputs]
        delta = matrix_delta(up, sums, 1.0)
    return Change(deltas={f"{module.name}.weight": delta})
