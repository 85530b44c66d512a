"""IA3 as PEFT saves it: each output or each input channel of a layer is rescaled (arXiv 2205.05638).

y = l (W x + b)        W' = l W, b' = l b      ia3_l (O, 1), or (1, O, 1, ...) for convolutions
y = W (l x) + b        W' = W l                ia3_l (1, I), or (1, I, 1, ...), of feedforward_modules
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import base_bias, of_type, stored_transposed
from tpeft_deploy.formats.peft.dense import misfit
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing, no_scale, reporting, take
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-ia3"
ABOUT = About("PEFT", "IA3", "linear, Conv1D, conv 2d and 3d", "yes", "gain, override", types=("IA3",))
_VECTOR = "ia3_l"
SUFFIXES = frozenset({_VECTOR})
_GROUPED = "kept dense, as the gain differs between the groups' inputs"
matches = of_type("IA3", _VECTOR)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The weight's gain, and the rescaled bias if the layer has one and its outputs are rescaled.

    Raises:
        FormatError: no base was given (needed for the number of axes and the bias); or the vector does not fit.
    """
    no_scale(module, checkpoint)
    vector = take(module, checkpoint, _VECTOR)
    vector = vector.astype(np.promote_types(vector.dtype, np.float32))
    weight = base_array(module, checkpoint, "weight", "IA3 names channels of the base's weight")
    with reporting(module, checkpoint):
        if _is_feedforward(module, checkpoint):
            return _on_inputs(module, checkpoint, vector.reshape(-1), weight)
        return _on_outputs(module, checkpoint, vector.reshape(-1), weight)


def _on_outputs(module: Module, checkpoint: Checkpoint, vector: Array, weight: Array) -> Change:
    axis = 0
    if weight.ndim == 2:
        axis = int(stored_transposed(module, checkpoint, vector.size, weight.size // max(1, vector.size)))
    gain = _along(module, checkpoint, vector, weight, axis)
    bias = base_bias(module, checkpoint, "IA3 rescales the base's bias as well")
    overrides = {} if bias is None else {f"{module.name}.bias": (bias * vector).astype(vector.dtype)}
    return Change(gains={f"{module.name}.weight": gain}, overrides=overrides)


def _on_inputs(module: Module, checkpoint: Checkpoint, vector: Array, weight: Array) -> Change:
    target = f"{module.name}.weight"
    if weight.ndim == 2:
        transposed = stored_transposed(module, checkpoint, weight.size // max(1, vector.size), vector.size)
        return Change(gains={target: _along(module, checkpoint, vector, weight, 0 if transposed else 1)})
    groups, left = divmod(vector.size, weight.shape[1])
    if left or groups == 0 or weight.shape[0] % groups:
        raise _misfit(module, checkpoint, vector, weight, 1)
    if groups == 1:
        return Change(gains={target: _along(module, checkpoint, vector, weight, 1)})
    gain = np.repeat(vector.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    gain = gain.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    if weight.shape[1] == 1:
        return Change(gains={target: gain})
    change = ((gain.astype(np.float64) - 1) * weight).astype(vector.dtype)
    return Change(deltas={target: TuckerDelta(change, (None,) * change.ndim)}, notes={target: _GROUPED})


def _along(module: Module, checkpoint: Checkpoint, vector: Array, weight: Array, axis: int) -> Array:
    """The vector as a gain along one axis of the weight."""
    if vector.size != weight.shape[axis]:
        raise _misfit(module, checkpoint, vector, weight, axis)
    return vector.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])


def _misfit(module: Module, checkpoint: Checkpoint, vector: Array, weight: Array, axis: int) -> FormatError:
    expected = f"one number for each channel along axis {axis} of a weight of shape {weight.shape}"
    return misfit(module, checkpoint, expected, vector.size)


def _is_feedforward(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether inputs are rescaled, as in IA3Model._check_target_module_feedforward."""
    names = checkpoint.config.get("feedforward_modules")
    if not isinstance(names, str | list):
        raise FormatError(
            doing(module, checkpoint),
            expected="feedforward_modules in adapter_config.json, which select inputs or outputs",
            got=repr(names),
            fix="Save the adapter again with save_pretrained.",
        )
    if isinstance(names, str):
        return checkpoint.matcher("feedforward_modules", whole=True).first(module.name) is not None
    return checkpoint.endings("feedforward_modules").end(module.name)
