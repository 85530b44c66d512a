"""Free sizes of a graph's inputs, and example inputs brought to other sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.oracle.base import Inputs
from tpeft_deploy.tucker import Array

__all__ = ["Sizes", "batch_axis", "free_sizes", "resize"]

Sizes = dict[str, int]
_MOST = 1 << 20


def batch_axis(graph: ir.Graph) -> str | None:
    """Name of the batch's free size: the first axis of the first input that has a free one."""
    firsts = [value.shape[0] for value in graph.inputs if value.shape]
    return next((str(size.value) for size in firsts if isinstance(size, ir.SymbolicDim)), None)


def resize(graph: ir.Graph, example: Inputs, sizes: Sizes) -> Inputs:
    """Bring example inputs to other free sizes by repeating them.

    Repeated rows are rolled along their last axis, so that all differ: equal rows would hide a wrong row order.
    """
    inputs = {}
    for value in graph.inputs:
        array = example[str(value.name)]
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim):
                array = _repeat(array, axis, _evaluate(dim, sizes))
        inputs[str(value.name)] = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    return inputs


def free_sizes(graph: ir.Graph, inputs: Inputs) -> Sizes:
    """Find the free sizes of inputs."""
    dims = [
        (dim, size)
        for value in graph.inputs
        for dim, size in zip(value.shape or (), inputs[str(value.name)].shape, strict=True)
        if isinstance(dim, ir.SymbolicDim)
    ]
    sizes = {str(dim.value): size for dim, size in dims if dim.free_symbols() == {str(dim.value)}}
    for dim, size in dims:
        unknown = [name for name in dim.free_symbols() if name not in sizes]
        if len(unknown) == 1:  # a multiple of something, as torch.export names it: 14*_height
            sizes[unknown[0]] = next(n for n in range(1, _MOST) if _evaluate(dim, sizes | {unknown[0]: n}) == size)
    return sizes


def _evaluate(dim: ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    value = dim.evaluate(dict(sizes))
    if not isinstance(value, int):
        raise TypeError(f"size {dim} cannot be found from {sizes}")
    return value


def _repeat(array: Array, axis: int, size: int) -> Array:
    length = array.shape[axis]
    if size <= length or axis > 0:
        repeated: Array = array.take(np.arange(size) % length, axis)
        return repeated
    return np.stack([_varied(array[row % length], row // length) for row in range(size)])


def _varied(row: Array, times: int) -> Array:
    if row.ndim:
        return np.roll(row, times, -1)
    return row * np.asarray(1 + times / 8, row.dtype) if row.dtype.kind == "f" else row
