"""Readers of PEFT's methods that change single elements of a weight."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import alpha_of
from tpeft_deploy.formats.peft.dense import dense_change, indices, linear_layer, positions, require_values
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader

__all__ = ["read_shira", "read_supertuning"]

_SHIRA_VALUES, _SHIRA_INDICES = "shira_weight", "shira_indices"


@reader(
    "peft-shira",
    About("PEFT", "SHiRA", "linear", "yes", "dense", types=("SHIRA",)),
    {_SHIRA_VALUES, _SHIRA_INDICES},
    marks={_SHIRA_VALUES},
)
def read_shira(module: Module) -> Change:
    """SHiRA as PEFT saves it: a sparse change of single elements (arXiv 2406.13175).

        dW[i, j] = v        shira_weight (n,) as v, shira_indices (2, n) as i and j

    PEFT on Windows saves the indices as floating point numbers.
    """
    module.no_scale()
    values, indices = module.take(_SHIRA_VALUES), module.take(_SHIRA_INDICES)
    layer = linear_layer(module, "SHiRA's indices do not record the size of a layer")
    if indices.ndim != 2 or indices.shape[0] != 2:
        raise module.misfit("indices (2, n)", indices.shape)
    return dense_change(module, positions(module, indices[0], indices[1], values, layer))


_SUPERTUNING_VALUES, _SUPERTUNING_INDICES = "supertuning_values", "supertuning_indices"
_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


@reader(
    "peft-supertuning",
    About(
        "PEFT", "Super-Tuning", "linear", "yes", "dense", "saved with save_precomputed_indices", types=("SUPERTUNING",)
    ),
    {_SUPERTUNING_VALUES, _SUPERTUNING_INDICES, _A, _B},
    marks={_SUPERTUNING_VALUES},
)
def read_supertuning(module: Module) -> Change:
    """Super-Tuning as PEFT saves it: a sparse change of single elements, and LoRA beside it (arXiv 2607.09287).

        dW[p // I, p % I] = v, plus lora_alpha / r B A if `r` is set

    supertuning_indices (n,) as p, supertuning_values (n,) as v, supertuning_lora_A.weight (r, I) and
    supertuning_lora_B.weight (O, r).  Without save_precomputed_indices PEFT recomputes the indices as the largest
    elements of the base, where the order of equal ones is undefined: such files are refused.
    """
    module.no_scale()
    if _SUPERTUNING_INDICES not in module.tensors:
        raise FormatError(
            module.doing,
            expected=f"a tensor {_SUPERTUNING_INDICES}",
            got="a file saved with save_precomputed_indices=False, which leaves them to the order of equal weights",
            fix="Save the adapter again with save_precomputed_indices=True in its configuration.",
        )
    values, found = module.take(_SUPERTUNING_VALUES), module.take(_SUPERTUNING_INDICES)
    layer = linear_layer(module, "Super-Tuning's indices do not record the size of a layer")
    flat = indices(module, found, layer.size)
    change = positions(module, flat // layer.inputs, flat % layer.inputs, values, layer)
    if module.checkpoint.config.get("r") is not None:
        down, up = module.take(_A), module.take(_B)
        require_values(module, **{_A: down, _B: up})
        if down.ndim != 2 or down.shape[1] != layer.inputs or up.shape != (layer.outputs, down.shape[0]):
            raise module.misfit(
                f"factors (r, {layer.inputs}) and ({layer.outputs}, r)",
                f"{down.shape} and {up.shape}",
            )
        scale = alpha_of(module.checkpoint, module.name, down.shape[0], "lora_alpha") / down.shape[0]
        change = (change + scale * np.matmul(up, down, dtype=np.float64)).astype(change.dtype)
    return dense_change(module, change)
