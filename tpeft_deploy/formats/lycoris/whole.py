"""Readers of LyCORIS' whole tensors: full, norm and IA3."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["added", "bias_override", "read_full", "read_ia3", "read_norm"]


def _is_full(module: Module) -> bool:
    """Whether the module has a dense change of its weight, or a change of its bias alone."""
    return "diff" in module.tensors or set(module.tensors) == {"diff_b"}


@reader(
    "lycoris-full",
    About("LyCORIS", "full", "linear, conv, norms", "for biases and norms", "dense, override"),
    {"diff", "diff_b"},
    matches=_is_full,
)
def read_full(module: Module) -> Change:
    """LyCORIS' full: the dense change of a weight and of a bias.

        W' = W + diff           b' = b + diff_b

    A diff of one axis belongs to a norm's weight.  diff_b occurs beside other formats' tensors too.
    """
    module.no_scale()
    diff = module.tensors.pop("diff", None)
    target = f"{module.name}.weight"
    bias = bias_override(module)
    if diff is None:
        return Change(overrides=bias)
    if diff.ndim < 2:
        return Change(overrides={target: added(module, "weight", diff), **bias})
    with module.reporting():
        delta = TuckerDelta(diff, (None,) * diff.ndim)
    return Change(deltas={target: delta}, overrides=bias, notes={target: "LyCORIS full: a dense change, kept dense"})


def bias_override(module: Module) -> Mapping[str, Array]:
    """Pop diff_b: the bias's name -> the base's bias + diff_b; empty if the module has none.

    Raises:
        FormatError: no base was given, or it has no bias of that shape there.
    """
    diff = module.tensors.pop("diff_b", None)
    return {} if diff is None else {f"{module.name}.bias": added(module, "bias", diff)}


def added(module: Module, tensor: str, difference: Array) -> Array:
    """The base's parameter plus a difference of the same shape, in float32 or wider.

    Raises:
        FormatError: no base was given, or its parameter is missing or has another shape.
    """
    base = module.base_array(tensor, f"the file has only the difference to the base's {tensor}")
    if base.shape != difference.shape:
        raise module.misfit(f"a difference of shape {base.shape}, as the base's {tensor}", difference.shape)
    dtype = np.result_type(np.float32, base.dtype, difference.dtype)
    return (base.astype(np.float64) + difference).astype(dtype)


_PARTS = {"w_norm": "weight", "b_norm": "bias"}


@reader("lycoris-norm", About("LyCORIS", "norm", "norms", "yes", "override"), frozenset(_PARTS))
def read_norm(module: Module) -> Change:
    """LyCORIS' norm: changes of a norm's weight and bias, which are read as overrides.

    w' = w + w_norm         b' = b + b_norm
    """
    module.no_scale()
    found = {tensor: module.tensors.pop(name) for name, tensor in _PARTS.items() if name in module.tensors}
    return Change(
        overrides={f"{module.name}.{tensor}": added(module, tensor, difference) for tensor, difference in found.items()}
    )


@reader(
    "lycoris-ia3", About("LyCORIS", "IA3", "linear, conv", "yes", "gain"), {"weight", "on_input"}, marks={"on_input"}
)
def read_ia3(module: Module) -> Change:
    """IA3 as LyCORIS writes it (arXiv 2205.05638): each output or each input channel of a weight is rescaled.

        W' = W (1 + weight)     weight (n,), or (1, n, 1, ...) for a convolution; on_input selects the channels

    The bias is not rescaled, as in LyCORIS' forward.
    """
    module.no_scale()
    on_input = module.take("on_input")
    learnt = module.take("weight")
    shape = module.base_array("weight", "IA3 names channels of the base's weight").shape
    if on_input.size != 1 or float(on_input.reshape(())) not in {0.0, 1.0}:
        raise FormatError(module.doing, expected="on_input 0 or 1", got=on_input.tolist())
    axis = int(on_input.reshape(()))
    channels = shape[axis] if len(shape) > axis else None
    if learnt.size != channels or math.prod(learnt.shape) != max(learnt.shape, default=1):
        raise _misfit(module, learnt, axis, shape)
    dtype = np.promote_types(learnt.dtype, np.float32)
    gain = (1 + learnt.astype(np.float64)).astype(dtype)
    return Change(gains={f"{module.name}.weight": gain.reshape([-1 if a == axis else 1 for a in range(len(shape))])})


def _misfit(module: Module, learnt: Array, axis: int, shape: tuple[int, ...]) -> FormatError:
    return FormatError(
        module.doing,
        expected=f"one number for each of the {('outputs', 'inputs')[axis]} of a weight of shape {shape}",
        got=f"shape {learnt.shape}",
        fix="Check the base; on a grouped convolution LyCORIS' IA3 cannot act on the inputs.",
    )
