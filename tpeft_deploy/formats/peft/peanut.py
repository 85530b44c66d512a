"""PEANuT as PEFT saves it: a small network computes the change from the base weight (arXiv 2410.01870).

dW = s B h(W)^T        h(W) = act(W^T A^T), then `depth` layers act(. E_i^T), then as many act(. D_i^T), each of which
                       adds the input of its encoder

peanut_A.weight (r, O), peanut_B.weight (O, r), peanut_encoders.<i>.weight and peanut_decoders.<i>.weight (r, r); s is
`scaling` and act is `act_fn`.  The change is of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.base.weight_changes import base_weight, change_of_base
from tpeft_deploy.formats.peft.config import matrix_delta, number
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_peanut"]

_A, _B = "peanut_A.weight", "peanut_B.weight"
_DEEPEST = 32


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _erf_gelu(x: Array) -> Array:
    gelu: Array = x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))) / 2
    return gelu


# Names as in transformers' ACT2FN.
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _erf_gelu,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "linear": lambda x: x,
}


@reader(
    "peft-peanut",
    About("PEFT", "PEANuT", "linear", "yes", "low-rank", types=("PEANUT",)),
    frozenset({_A, _B})
    | {f"peanut_{side}.{layer}.weight" for side in ("encoders", "decoders") for layer in range(_DEEPEST)},
    marks={_A},
)
def read_peanut(module: Module) -> Change:
    """The module's change, of rank r."""
    weight = base_weight(module, "PEANuT")
    first, last = module.take(_A), module.take(_B)
    activation = _activation(module)
    scale = number(module.checkpoint, "scaling")
    depth = sum(name.startswith("peanut_encoders.") for name in module.tensors)
    if module.checkpoint.config.get("depth") != depth:
        raise FormatError(
            module.doing,
            expected=f"as many encoders as depth in adapter_config.json, {module.checkpoint.config.get('depth')!r}",
            got=depth,
            fix=f"Copy both files of one adapter; a depth above {_DEEPEST} is not read.",
        )
    encoders, decoders = (
        [module.take(f"peanut_{side}.{layer}.weight") for layer in range(depth)] for side in ("encoders", "decoders")
    )
    with module.reporting():
        rank = len(first)
        shapes = {tensor.shape for tensor in (*encoders, *decoders)} - {(rank, rank)}
        if weight.ndim != 2 or first.shape != (rank, len(weight)) or last.shape != (len(weight), rank) or shapes:
            raise ValueError(f"a network of rank {rank} for a weight of shape {weight.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            dtype = np.promote_types(first.dtype, np.float32)
            if rank > len(weight):
                run = partial(_network, encoders=encoders, decoders=decoders, activation=activation)
                change = _by_columns(weight, first, last, run)
                return change_of_base(module, TuckerDelta(change.astype(dtype), (None, None), scale))
            hidden = _network(weight.T @ first.T.astype(np.float64), encoders, decoders, activation)
            delta = matrix_delta(last.astype(dtype), hidden.T.astype(dtype), scale)
        return change_of_base(module, delta)


def _by_columns(weight: Array, first: Array, last: Array, run: Callable[[Array], Array]) -> Array:
    """B h(W)^T, some columns at a time: for a rank above the number of outputs h(W) is larger than weight and file."""
    step = max(1, weight.size // len(first))
    change = np.empty(weight.shape)
    for start in range(0, weight.shape[1], step):
        columns = slice(start, start + step)
        hidden = run(weight[:, columns].T @ first.T.astype(np.float64))
        change[:, columns] = last.astype(np.float64) @ hidden.T
    return change


def _network(x: Array, encoders: list[Array], decoders: list[Array], activation: Callable[[Array], Array]) -> Array:
    x = activation(x)
    before = []
    for encoder in encoders:
        before.append(x)
        x = activation(x @ encoder.T.astype(np.float64))
    for decoder in decoders:
        x = activation(x @ decoder.T.astype(np.float64)) + before.pop()
    return x


def _activation(module: Module) -> Callable[[Array], Array]:
    name = module.checkpoint.config.get("act_fn")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise FormatError(
            module.doing,
            expected=f"act_fn {', '.join(_ACTIVATIONS)} in adapter_config.json",
            got=repr(name),
            fix="Merge it with PEFT's merge_and_unload and export the merged model as a base.",
        )
    return _ACTIVATIONS[name]
