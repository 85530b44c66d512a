"""Inputs to prove an export with: the example's own sizes, and others along every axis that may vary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.oracle.base import Base, Inputs
from tpeft_deploy.tucker import Array

__all__ = ["Sizes", "batch_axis", "empty_shapes", "own_sizes", "rows_differ", "shapes_to_prove", "takes", "with_sizes"]

Sizes = dict[str, int]
ROWS = (2, 5)
_MOST = 1 << 20


def batch_axis(graph: ir.Graph) -> str | None:
    """The free size that stands for the batch: the first axis of the first input that has one."""
    firsts = [value.shape[0] for value in graph.inputs if value.shape]
    return next((str(size.value) for size in firsts if isinstance(size, ir.SymbolicDim)), None)


def shapes_to_prove(base: Base, graph: ir.Graph) -> list[Sizes]:
    """The free sizes to run an export at: those of the example, and others along every axis at once.

    Whether a model takes a size is asked of the model itself: not every length or image size is one.

    Args:
        base: gives the example and is tried at the other sizes.
        graph: its raw graph, whose inputs name the free sizes.
    """
    if base.proved_at is None:
        base.proved_at = _find_shapes(base, graph)
    return [dict(sizes) for sizes in base.proved_at]


def _find_shapes(base: Base, graph: ir.Graph) -> list[Sizes]:
    own = own_sizes(base, graph)
    batch = batch_axis(graph)
    first = own | ({batch: ROWS[0]} if batch is not None else {})
    rows = {batch: ROWS[1]} if batch is not None else {}
    others = [name for name in own if name != batch]
    # Doubling keeps every divisor that a model may ask of a size; limits on length are met by one more or one less.
    for factor, step in ((2, 0), (1, 1), (1, -1)) if others else ():
        sizes = own | {name: factor * own[name] + step for name in others} | rows
        if min(sizes.values()) >= 1 and takes(base, graph, sizes):
            return [first, sizes]
    return [first, own | rows] if batch is not None else [first]


def empty_shapes(base: Base, graph: ir.Graph) -> dict[str, Sizes]:
    """The sizes to run an export at with one free size of 0: the past of a decoder's first step.

    Returns:
        Name of the free size -> all sizes; only names at whose 0 the base runs and every output has finite elements.
    """
    first, batch = shapes_to_prove(base, graph)[0], batch_axis(graph)
    names = [str(output.name) for output in graph.outputs]
    found = {}
    for name in first:
        sizes = first | {name: 0}
        if name == batch:
            continue
        try:
            outputs = base.reference(None, with_sizes(base, graph, sizes), names)
        except Exception:  # models raise every kind of exception; such a size is none of theirs
            continue
        if all(array.size and np.isfinite(array).all() for array in outputs.values()):
            found[name] = sizes
    return found


def with_sizes(base: Base, graph: ir.Graph, sizes: Sizes) -> Inputs:
    """A base's example inputs brought to other sizes by repeating them.

    Repeated rows are rolled along their last axis, so that all differ: equal rows would hide a wrong row order.
    """
    inputs = {}
    for value in graph.inputs:
        array = base.inputs[str(value.name)]
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim):
                array = _repeat(array, axis, _evaluate(dim, sizes))
        inputs[str(value.name)] = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    return inputs


def rows_differ(base: Base, graph: ir.Graph) -> bool:
    """Whether a base's example has rows that differ: where all are alike, nothing tells them apart in a model."""
    batch = batch_axis(graph)
    if batch is None:
        return False
    inputs = with_sizes(base, graph, own_sizes(base, graph) | {batch: ROWS[0]})
    batched = [str(value.name) for value in graph.inputs if value.shape and str(value.shape[0]) == batch]
    return any(not np.array_equal(inputs[name][0], inputs[name][1]) for name in batched)


def own_sizes(base: Base, graph: ir.Graph) -> Sizes:
    """The free sizes of a base's example inputs."""
    dims = [
        (dim, size)
        for value in graph.inputs
        for dim, size in zip(value.shape or (), base.inputs[str(value.name)].shape, strict=True)
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


def takes(base: Base, graph: ir.Graph, sizes: Sizes) -> bool:
    """Whether a base itself runs at some sizes."""
    names = [str(output.name) for output in graph.outputs]
    try:
        base.reference(None, with_sizes(base, graph, sizes), names)
    except Exception:
        return False
    return True


def _repeat(array: Array, axis: int, size: int) -> Array:
    own = array.shape[axis]
    if size <= own or axis > 0:
        repeated: Array = array.take(np.arange(size) % own, axis)
        return repeated
    return np.stack([_varied(array[row % own], row // own) for row in range(size)])


def _varied(row: Array, times: int) -> Array:
    if row.ndim:
        return np.roll(row, times, -1)
    return row * np.asarray(1 + times / 8, row.dtype) if row.dtype.kind == "f" else row
