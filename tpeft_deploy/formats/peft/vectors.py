"""Readers of PEFT's methods that train a vector per layer."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.algebra import widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import base_bias, stored_transposed
from tpeft_deploy.formats.peft.dense import base_digest
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_beft", "read_ia3", "read_ln_tuning"]

_BIAS = "beft_bias"


@reader("peft-beft", About("PEFT", "BEFT", "biases of linear layers", "yes", "override", types=("BEFT",)), {_BIAS})
def read_beft(module: Module) -> Change:
    """BEFT as PEFT saves it: a change of a layer's bias, read as an override (arXiv 2509.15974).

    b' = b + beft_bias (1, O)
    """
    module.no_scale()
    added = module.take(_BIAS)
    bias = base_bias(module, "BEFT adds to the base's bias")
    if bias is None:
        raise FormatError(
            module.doing,
            expected=f"a bias {module.name}.bias in the base, which BEFT adds to",
            got="a layer without one",
            fix="Give the layer a bias of zeros in the base, which changes no output.",
        )
    if added.shape != (1, *bias.shape):
        raise module.misfit(f"a tensor {(1, *bias.shape)}", added.shape)
    name = f"{module.name}.bias"
    return Change(
        overrides={name: (bias + added[0]).astype(widen(added[:0]).dtype)}, digests=base_digest(module.checkpoint, name)
    )


_VECTOR = "ia3_l"
_GROUPED = "kept dense, as the gain differs between the groups' inputs"


@reader(
    "peft-ia3",
    About("PEFT", "IA3", "linear, Conv1D, conv 2d and 3d", "yes", "gain, override", types=("IA3",)),
    {_VECTOR},
)
def read_ia3(module: Module) -> Change:
    """IA3 as PEFT saves it: each output or each input channel of a layer is rescaled (arXiv 2205.05638).

    y = l (W x + b)        W' = l W, b' = l b      ia3_l (O, 1), or (1, O, 1, ...) for convolutions
    y = W (l x) + b        W' = W l                ia3_l (1, I), or (1, I, 1, ...), of feedforward_modules
    """
    module.no_scale()
    vector = module.take(_VECTOR)
    vector = vector.astype(np.promote_types(vector.dtype, np.float32))
    weight = module.base_array("weight", "IA3 names channels of the base's weight")
    with module.reporting():
        if _is_feedforward(module):
            return _ia3_on_inputs(module, vector.reshape(-1), weight)
        return _ia3_on_outputs(module, vector.reshape(-1), weight)


def _ia3_on_outputs(module: Module, vector: Array, weight: Array) -> Change:
    axis = 0
    if weight.ndim == 2:
        axis = int(stored_transposed(module, vector.size, weight.size // max(1, vector.size)))
    gain = _ia3_along(module, vector, weight, axis)
    bias = base_bias(module, "IA3 rescales the base's bias as well")
    overrides = {} if bias is None else {f"{module.name}.bias": (bias * vector).astype(vector.dtype)}
    return Change(gains={f"{module.name}.weight": gain}, overrides=overrides)


def _ia3_on_inputs(module: Module, vector: Array, weight: Array) -> Change:
    target = f"{module.name}.weight"
    if weight.ndim == 2:
        transposed = stored_transposed(module, weight.size // max(1, vector.size), vector.size)
        return Change(gains={target: _ia3_along(module, vector, weight, 0 if transposed else 1)})
    groups, left = divmod(vector.size, weight.shape[1])
    if left or groups == 0 or weight.shape[0] % groups:
        raise _ia3_misfit(module, vector, weight, 1)
    if groups == 1:
        return Change(gains={target: _ia3_along(module, vector, weight, 1)})
    gain = np.repeat(vector.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    gain = gain.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    if weight.shape[1] == 1:
        return Change(gains={target: gain})
    change = ((gain.astype(np.float64) - 1) * weight).astype(vector.dtype)
    return Change(deltas={target: TuckerDelta(change, (None,) * change.ndim)}, notes={target: _GROUPED})


def _ia3_along(module: Module, vector: Array, weight: Array, axis: int) -> Array:
    """The vector as a gain along one axis of the weight."""
    if vector.size != weight.shape[axis]:
        raise _ia3_misfit(module, vector, weight, axis)
    return vector.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])


def _ia3_misfit(module: Module, vector: Array, weight: Array, axis: int) -> FormatError:
    expected = f"one number for each channel along axis {axis} of a weight of shape {weight.shape}"
    return module.misfit(expected, vector.size)


def _is_feedforward(module: Module) -> bool:
    """Whether inputs are rescaled, as in IA3Model._check_target_module_feedforward."""
    names = module.checkpoint.config.get("feedforward_modules")
    if not isinstance(names, str | list):
        raise FormatError(
            module.doing,
            expected="feedforward_modules in adapter_config.json, which select inputs or outputs",
            got=repr(names),
            fix="Save the adapter again with save_pretrained.",
        )
    if isinstance(names, str):
        return module.checkpoint.matcher("feedforward_modules", whole=True).first(module.name) is not None
    return module.checkpoint.endings("feedforward_modules").end(module.name)


_COPY = "ln_tuning_layers."
_LN_TUNING_SUFFIXES = frozenset(
    f"{_COPY}{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)


@reader(
    "peft-ln-tuning", About("PEFT", "LN tuning", "norms", "no", "override", types=("LN_TUNING",)), _LN_TUNING_SUFFIXES
)
def read_ln_tuning(module: Module) -> Change:
    """LN tuning as PEFT saves it: a trained copy of each norm, which replaces that of the base (arXiv 2312.11420).

    The parameters, and the statistics of a BatchNorm, are read as overrides.
    """
    module.no_scale()
    found = {name.removeprefix(_COPY): module.tensors.pop(name) for name in _LN_TUNING_SUFFIXES & module.tensors.keys()}
    return Change(overrides={f"{module.name}.{name}": tensor for name, tensor in found.items()})
