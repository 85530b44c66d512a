"""Subject of an export: a base with its raw graph, its free sizes, inputs and reference answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import onnx_ir as ir

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters.oracle import decoder_runs
from tpeft_deploy.exporters.oracle.base import Base, Inputs, Outputs
from tpeft_deploy.tucker import Array

__all__ = ["Sizes", "Subject", "batch_axis"]

Sizes = dict[str, int]
"""Size of each free axis by its name."""

_ROWS = (2, 5)
_MOST = 1 << 20


class Subject:
    """A base with its raw graph.

    Args:
        base: the oracle, on its example inputs.
        graph: its raw graph, which names inputs, outputs and free sizes.
    """

    def __init__(self, base: Base, graph: ir.Graph) -> None:
        self.base = base
        self.graph = graph
        self.batch = batch_axis(graph)
        self.outputs = [str(value.name) for value in graph.outputs]
        self._answers: dict[frozenset[tuple[str, int]], Outputs] = {}

    @cached_property
    def example_sizes(self) -> Sizes:
        """Free sizes of the example inputs."""
        return _free_sizes(self.graph, self.base.inputs)

    @cached_property
    def shapes(self) -> list[Sizes]:
        """Free sizes to run an export at: those of the example, then others along every axis at once.

        The model itself decides whether it takes a size: some lengths and image sizes are refused.
        """
        own = self.example_sizes
        if self.base.decoder is not None:
            return decoder_runs.run_sizes(own)
        first, rows = ({self.batch: count} if self.batch is not None else {} for count in _ROWS)
        others = [name for name in own if name != self.batch]
        # Doubling keeps every divisor that a model may ask of a size; limits on length are met by one more or one less.
        for factor, step in ((2, 0), (1, 1), (1, -1)) if others else ():
            sizes = own | {name: factor * own[name] + step for name in others} | rows
            if min(sizes.values()) >= 1 and self.takes(sizes):
                return [own | first, sizes]
        return [own | first, own | rows] if rows else [own]

    @cached_property
    def empty_shapes(self) -> dict[str, Sizes]:
        """Sizes with one free size of 0, such as the past at a decoder's first step, by the name of that free size.

        Omits a name if the base fails at its 0, or an output has an element that is not finite.
        """
        first = self.shapes[0]
        tried = {name: first | {name: 0} for name in first if name != self.batch}
        return {
            name: sizes
            for name, sizes in tried.items()
            if self.takes(sizes)
            and all(array.size and np.isfinite(array).all() for array in self.reference(None, sizes).values())
        }

    @property
    def rows_differ(self) -> bool:
        """Whether the example has rows that differ: rows that are alike cannot be told apart in a model."""
        if self.batch is None:
            return False
        inputs = self.inputs(self.example_sizes | {self.batch: _ROWS[0]})
        batched = [str(value.name) for value in self.graph.inputs if value.shape and str(value.shape[0]) == self.batch]
        return any(not np.array_equal(inputs[name][0], inputs[name][1]) for name in batched)

    def inputs(self, sizes: Sizes) -> Inputs:
        """The example inputs at other free sizes."""
        inputs, decoder = _resize(self.graph, self.base.inputs, sizes), self.base.decoder
        return inputs if decoder is None else decoder_runs.with_pasts(decoder, inputs)

    def takes(self, sizes: Sizes) -> bool:
        """Whether the base itself runs at some free sizes."""
        try:
            self.reference(None, sizes)
        except Exception:  # models raise every kind of exception
            return False
        return True

    def reference(self, adapter: Adapter | None, sizes: Sizes) -> Outputs:
        """Outputs of the base with an adapter's merged weights at some free sizes; those of the base alone are kept."""
        if adapter is not None:
            return self.answer(adapter, self.inputs(sizes))
        key = frozenset(sizes.items())
        if key not in self._answers:
            # Copies: a model may return a buffer that its next run overwrites.
            self._answers[key] = {name: array.copy() for name, array in self.answer(None, self.inputs(sizes)).items()}
        return dict(self._answers[key])

    def answer(self, adapter: Adapter | None, inputs: Inputs) -> Outputs:
        """Outputs of the base with an adapter's merged weights on any inputs."""
        return self.base.reference(adapter, inputs, self.outputs)


def batch_axis(graph: ir.Graph) -> str | None:
    """Name of the batch's free size: the first axis of the first input that has a free one."""
    firsts = [value.shape[0] for value in graph.inputs if value.shape]
    return next((str(size.value) for size in firsts if isinstance(size, ir.SymbolicDim)), None)


def _resize(graph: ir.Graph, example: Inputs, sizes: Sizes) -> Inputs:
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


def _free_sizes(graph: ir.Graph, inputs: Inputs) -> Sizes:
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
