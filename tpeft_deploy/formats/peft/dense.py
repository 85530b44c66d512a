"""Helpers for readers of dense and sparse changes of PEFT: sizes of a layer in the base, and dense deltas."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpeft_deploy.algebra import widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import weight_shape
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = [
    "Linear",
    "base_digest",
    "dense_change",
    "indices",
    "linear_layer",
    "no_projection",
    "positions",
    "require_values",
    "whole_number",
]


class Linear(NamedTuple):
    """Sizes of a linear layer of the base, and whether its weight is stored as (inputs, outputs)."""

    outputs: int
    inputs: int
    transposed: bool

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return self.outputs * self.inputs


def linear_layer(module: Module, why: str) -> Linear:
    """Look up a module's linear layer in the base.

    Args:
        module: module that is read.
        why: purpose of the base, as a clause.

    Raises:
        FormatError: no base was given, or its module has no weight of two axes.
    """
    shape = weight_shape(f"{module.name}.weight", module.checkpoint) or module.base_array("weight", why).shape
    if len(shape) != 2:
        raise module.misfit("a linear layer", f"a weight of shape {shape}")
    kind = module.checkpoint.base.kinds.get(module.name) if module.checkpoint.base is not None else None
    # PEFT records the layout of the last layer alone, so the layer's class takes precedence.
    if kind == "Conv1D" if kind is not None else module.checkpoint.config.get("fan_in_fan_out"):
        return Linear(shape[1], shape[0], transposed=True)
    return Linear(shape[0], shape[1], transposed=False)


def base_digest(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """Digest, by name, of a weight from which a change was computed: the change holds for this weight alone."""
    return {} if checkpoint.base is None else {name: checkpoint.base.digest(name)}


def dense_change(module: Module, change: Array, *, transposed: bool = False) -> Change:
    """Build a dense change (O, I) of the module's weight."""
    stored = np.ascontiguousarray(change.T) if transposed else change
    return Change(deltas={f"{module.name}.weight": TuckerDelta(stored, (None, None))})


def positions(module: Module, rows: Array, columns: Array, values: Array, layer: Linear) -> Array:
    """Build a change (O, I) with values at the given positions.

    Raises:
        FormatError: a position is outside the weight, not a whole number, or occurs twice.
    """
    rows, columns = (indices(module, part, size) for part, size in ((rows, layer.outputs), (columns, layer.inputs)))
    if not rows.shape == columns.shape == values.shape or values.ndim != 1:
        raise module.misfit("one value for each position", f"{rows.shape} and {values.shape}")
    flat = rows * layer.inputs + columns
    if len(np.unique(flat)) != flat.size:
        raise module.misfit("distinct positions", "a duplicate")
    change = np.zeros(layer.size, widen(values[:0]).dtype)
    change[flat] = values
    return change.reshape(layer.outputs, layer.inputs)


def indices(module: Module, found: Array, size: int) -> Array:
    """Convert indices to int64, and check that each is a whole number in range(size).

    Raises:
        FormatError: an index is not.
    """
    whole = found.astype(np.int64)
    if not np.array_equal(whole, found) or (whole.size and not 0 <= whole.min() <= whole.max() < size):
        raise module.misfit(f"whole numbers from 0 to {size - 1} as indices", "others")
    return whole


def require_values(module: Module, **tensors: Array) -> None:
    """Raise for empty tensors, which could claim any rank."""
    for name, tensor in tensors.items():
        if tensor.size == 0:
            raise module.misfit(f"values in {name}", f"none, of shape {tensor.shape}")


def whole_number(checkpoint: Checkpoint, name: str) -> int:
    """Read a whole number that the configuration must have.

    Raises:
        FormatError: the field is absent or not a whole number.
    """
    value = checkpoint.config.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(
            f"read {checkpoint.source}, adapter_config.json",
            expected=f"a whole number as {name}",
            got=repr(value)[:80],
            fix="Save the adapter again with save_pretrained.",
        )
    return value


def no_projection(module: Module, what: str) -> FormatError:
    """Make the error for a file with the seed of a random projection in place of the projection."""
    return FormatError(
        module.doing,
        expected=f"{what} in the file",
        got="only the seed of a random generator, which is not the same on all systems",
        fix="Save the adapter again with save_projection=True in its configuration.",
    )
