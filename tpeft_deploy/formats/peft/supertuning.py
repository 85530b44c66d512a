"""Super-Tuning as PEFT saves it: a sparse change of single elements, and LoRA beside it (arXiv 2607.09287).

    dW[p // I, p % I] = v, plus lora_alpha / r B A if `r` is set

supertuning_indices (n,) as p, supertuning_values (n,) as v, supertuning_lora_A.weight (r, I) and
supertuning_lora_B.weight (O, r).  Without save_precomputed_indices PEFT recomputes the indices as the largest elements
of the base, where the order of equal ones is undefined: such files are refused.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import alpha_of, of_type
from tpeft_deploy.formats.peft.dense import dense_change, indices, linear_layer, misfit, positions, require_values
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-supertuning"
ABOUT = About(
    "PEFT", "Super-Tuning", "linear", "yes", "dense", "saved with save_precomputed_indices", types=("SUPERTUNING",)
)
_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
SUFFIXES = frozenset({_VALUES, _INDICES, _A, _B})
matches = of_type("SUPERTUNING", _VALUES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, dense.

    Raises:
        FormatError: no base was given (needed for the size of the layer); or indices are missing, not in the weight,
            or not distinct; or the factors do not fit.
    """
    no_scale(module, checkpoint)
    if _INDICES not in module.tensors:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a tensor {_INDICES}",
            got="a file saved with save_precomputed_indices=False, which leaves them to the order of equal weights",
            fix="Save the adapter again with save_precomputed_indices=True in its configuration.",
        )
    values, found = take(module, checkpoint, _VALUES), take(module, checkpoint, _INDICES)
    layer = linear_layer(module, checkpoint, "Super-Tuning's indices do not record the size of a layer")
    flat = indices(module, checkpoint, found, layer.size)
    change = positions(module, checkpoint, flat // layer.inputs, flat % layer.inputs, values, layer)
    if checkpoint.config.get("r") is not None:
        down, up = take(module, checkpoint, _A), take(module, checkpoint, _B)
        require_values(module, checkpoint, **{_A: down, _B: up})
        if down.ndim != 2 or down.shape[1] != layer.inputs or up.shape != (layer.outputs, down.shape[0]):
            raise misfit(
                module,
                checkpoint,
                f"factors (r, {layer.inputs}) and ({layer.outputs}, r)",
                f"{down.shape} and {up.shape}",
            )
        scale = alpha_of(checkpoint, module.name, down.shape[0], "lora_alpha") / down.shape[0]
        change = (change + scale * np.matmul(up, down, dtype=np.float64)).astype(change.dtype)
    return dense_change(module, change)
