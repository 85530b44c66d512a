"""SHiRA as PEFT saves it: a sparse change of single elements (arXiv 2406.13175).

    dW[i, j] = v        shira_weight (n,) as v, shira_indices (2, n) as i and j

PEFT on Windows saves the indices as floating point numbers.
"""

from __future__ import annotations

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import of_type
from tpeft_deploy.formats.peft.dense import dense_change, linear_layer, misfit, positions
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-shira"
ABOUT = About("PEFT", "SHiRA", "linear", "yes", "dense", types=("SHIRA",))
_VALUES, _INDICES = "shira_weight", "shira_indices"
SUFFIXES = frozenset({_VALUES, _INDICES})
matches = of_type("SHIRA", _VALUES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, dense.

    Raises:
        FormatError: no base was given (needed for the size of the layer); or indices are missing, not in the weight,
            or not distinct.
    """
    no_scale(module, checkpoint)
    values, indices = take(module, checkpoint, _VALUES), take(module, checkpoint, _INDICES)
    layer = linear_layer(module, checkpoint, "SHiRA's indices do not record the size of a layer")
    if indices.ndim != 2 or indices.shape[0] != 2:
        raise misfit(module, checkpoint, "indices (2, n)", indices.shape)
    return dense_change(module, positions(module, checkpoint, indices[0], indices[1], values, layer))
