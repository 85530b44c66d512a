"""Uni-LoRA as PEFT saves it: LoRA with elements from a small set of trained numbers (arXiv 2506.00799).

    dW = B A        A = t[i_A] s_A, B = t[i_B] s_B, elementwise

base_model.unilora_theta_d is t, for all layers; unilora_indices_A and unilora_scales_A (r, I), unilora_indices_B and
unilora_scales_B (O, r) are the module's.  Without save_indices, the default in PEFT, the file has t alone, and the
indices depend on the order in which PEFT visited the layers: `refusals` refuses such files.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import matrix_delta, of_type, stored_transposed
from tpeft_deploy.formats.peft.dense import indices, misfit, require_values
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SHARED", "SUFFIXES", "matches", "read"]

NAME = "peft-unilora"
ABOUT = About("PEFT", "Uni-LoRA", "linear, Conv1D", "no", "low-rank", "saved with save_indices", types=("UNILORA",))
_NUMBERS = "base_model.unilora_theta_d"
SUFFIXES = frozenset(f"unilora_{what}_{letter}" for what in ("indices", "scales") for letter in "AB")
SHARED = frozenset({_NUMBERS})
matches = of_type("UNILORA", *SUFFIXES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of rank r.

    Raises:
        FormatError: a tensor is missing or does not fit, or an index is out of range.
    """
    no_scale(module, checkpoint)
    if _NUMBERS not in checkpoint.shared:
        raise FormatError(doing(module, checkpoint), expected=f"the shared tensor {_NUMBERS}", got="none")
    numbers = widen(checkpoint.shared[_NUMBERS].reshape(-1))
    down, up = (_factor(module, checkpoint, letter, numbers) for letter in "AB")
    if down.shape[0] != up.shape[1]:
        raise misfit(module, checkpoint, "indices of one rank", f"{down.shape} and {up.shape}")
    transposed = stored_transposed(module, checkpoint, up.shape[0], down.shape[1])
    return Change(deltas={f"{module.name}.weight": matrix_delta(up, down, 1.0, transposed=transposed)})


def _factor(module: Module, checkpoint: Checkpoint, letter: str, numbers: Array) -> Array:
    chosen = take(module, checkpoint, f"unilora_indices_{letter}")
    scales = take(module, checkpoint, f"unilora_scales_{letter}")
    require_values(module, checkpoint, scales=scales)
    if chosen.ndim != 2 or scales.shape != chosen.shape:
        raise misfit(module, checkpoint, "a scale for each index of a matrix", f"{scales.shape} and {chosen.shape}")
    factor: Array = numbers[indices(module, checkpoint, chosen, numbers.size)] * scales
    return factor.astype(np.result_type(numbers, np.float32))
