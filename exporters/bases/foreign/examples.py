"""Example inputs for a graph, when nobody gives any."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.oracle.base import Inputs
from tpeft_deploy.tucker import Array

__all__ = ["checked_inputs", "made_inputs"]

_ROWS = 2
_SIZES = (5, 7, 6, 9, 11, 13)  # of free axes but the batch; all different, so that mixed-up axes show


def made_inputs(name: str, graph: ir.Graph) -> dict[str, Array]:
    """Inputs of a graph's own types and fixed sizes: two rows, other free axes of 5, 7, 6, ...

    Floats are normal, integers 0 or 1 (which are ids, masks and segments alike), booleans true.

    Raises:
        UnsupportedBase: an input has no type or shape.
    """
    random = np.random.default_rng(0)
    sizes: dict[str, int] = {}
    others = iter(_SIZES)
    inputs: dict[str, Array] = {}
    for value in graph.inputs:
        if value.shape is None or value.dtype is None:
            raise UnsupportedBase(f"load base {name}, input {value.name!r}", problem="the file gives it no shape")
        shape = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim):
                free = str(size.value)
                if free not in sizes:
                    sizes[free] = _ROWS if axis == 0 else next(others, 2)
                size = sizes[free]  # noqa: PLW2901
            shape.append(size)
        inputs[str(value.name)] = _made(random, shape, value.dtype.numpy())
    return inputs


def _made(random: np.random.Generator, shape: list[int], dtype: np.dtype) -> Array:
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)


def checked_inputs(name: str, graph: ir.Graph, given: Mapping[str, object]) -> Inputs:
    """Given inputs as arrays, after a check that the graph takes them.

    Args:
        given: arrays or tensors by name.

    Raises:
        UnsupportedBase: names, types or ranks differ from the graph's.
    """
    expected = {str(value.name): value for value in graph.inputs}
    if set(given) != set(expected):
        raise UnsupportedBase(
            f"load base {name}",
            expected=f"example inputs {', '.join(sorted(expected))}",
            got=", ".join(sorted(map(str, given))) or "none",
        )
    inputs: dict[str, Array] = {}
    for key, value in expected.items():
        array = _array(given[key])
        wanted = value.dtype.numpy() if value.dtype is not None else array.dtype
        if array.dtype != wanted or (value.shape is not None and array.ndim != len(value.shape)):
            raise UnsupportedBase(
                f"load base {name}, input {key!r}",
                expected=f"{wanted} of shape {value.shape}",
                got=f"{array.dtype} of shape {array.shape}",
            )
        inputs[key] = array
    return _two_rows(graph, inputs)


def _array(value: object) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _two_rows(graph: ir.Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    """At least two rows where the batch is free: one row does not show how rows lie."""
    free = {str(v.name) for v in graph.inputs if v.shape and isinstance(v.shape[0], ir.SymbolicDim)}
    if any(inputs[name].shape[0] == 1 for name in free):
        return {name: np.concatenate([a, a]) if name in free else a for name, a in inputs.items()}
    return inputs
