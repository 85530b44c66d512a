"""SHiRA as PEFT saves it: a sparse change of single numbers (arXiv 2406.13175).

    dW[i, j] = v        shira_weight (n,) as v, shira_indices (2, n) as i and j

PEFT on Windows saves the indices as floating point numbers.
"""

from __future__ import annotations

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import is_type
from tpeft_deploy.formats.peft.dense import dense_change, linear_layer, misfit, positions
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-shira"
ABOUT = About("PEFT", "SHiRA", "linear", "yes", "dense", types=("SHIRA",))
_VALUES, _INDICES = "shira_weight", "shira_indices"
SUFFIXES = frozenset({_VALUES, _INDICES})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether a PEFT file of type SHIRA has values for the module."""
    return is_type(checkpoint, "SHIRA") and _VALUES in module.tensors


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, dense.

    Raises:
        FormatError: no base was given, which says how large the layer is; or indices are missing, not in the weight,
            or not distinct.
    """
    no_scale(module, checkpoint)
    values, indices = take(module, checkpoint, _VALUES), take(module, checkpoint, _INDICES)
    layer = linear_layer(module, checkpoint, "SHiRA's indices do not say how large a layer is")
    if indices.ndim != 2 or indices.shape[0] != 2:
        raise misfit(module, checkpoint, "indices (2, n)", indices.shape)
    return dense_change(module, positions(module, checkpoint, indices[0], indices[1], values, layer))
