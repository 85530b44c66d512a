"""Adapters stacked on the device: one row each, row 0 the base.

A `Bank` keeps its addresses as long as it lives; a row is written while runs read the others.  What no longer fits,
more rows or larger ranks, goes into a new bank, and runs that hold the old one finish on it.
"""

from __future__ import annotations

import math
import mmap
import operator
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnxruntime

from tpeft_deploy.bundle import fit, slots
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.packing import Packed, pack, with_one_rank
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.tucker import Array

__all__ = ["Bank", "Layout", "Rows", "Shape", "qualified", "row_bytes", "widened"]

Shape = tuple[int, ...]
Rows = Mapping[str, Array]  # graph input -> one row of its bank


@dataclass(frozen=True, eq=False)
class Layout:
    """How adapters of a bundle become rows.

    Args:
        neutral: input of the portable graph -> slot of the base: no change, or the base's tensor.
        packing: inputs of the graph that is served, where they stand in the place of others.
        parts: component -> layout of its graph, where there are several components.
    """

    neutral: Rows
    packing: Sequence[Packed] = ()
    parts: Mapping[str, Layout] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Bundle, packing: Sequence[Packed] = ()) -> Layout:
        """Return the layout of a bundle's banked graph; reads the base's tensors where tasks replace them."""
        neutral = fit.named(bundle.manifest, {target.key: bundle.default(target) for target in bundle.manifest.targets})
        return cls(neutral, packing)

    @classmethod
    def joined(cls, parts: Mapping[str, Layout]) -> Layout:
        """Return one layout of the graphs of all components; names of inputs get their component's prefix.

        Args:
            parts: component -> layout of its graph; the layout of an only component is returned as it is.
        """
        if len(parts) == 1:
            return next(iter(parts.values()))
        return cls(
            {qualified(own, name): row for own, part in parts.items() for name, row in part.defaults.items()},
            parts=parts,
        )

    @cached_property
    def defaults(self) -> Rows:
        """Graph input -> the row of the base."""
        return pack(self.packing, self.neutral, {})

    def widest(self, others: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
        """The shapes of rows that hold adapters with rows of these shapes.

        Args:
            others: per adapter, graph input -> shape of its row.
        """
        wide = widened(self.shapes, others)
        for packing in self._packings:
            wide = with_one_rank(packing, wide)
        return wide

    def rows(self, tensors: Rows) -> Rows:
        """An adapter's rows: graph input -> row with the adapter's ranks.

        Args:
            tensors: input of the portable graph -> slot, as `Bundle.feeds` gives them.
        """
        return pack(self.packing, tensors, self.neutral)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Graph input -> the smallest row it can have."""
        return {name: array.shape for name, array in self.defaults.items()}

    @cached_property
    def _packings(self) -> Sequence[Sequence[Packed]]:
        """Packed inputs by graph: those of one graph share a rank."""
        if not self.parts:
            return [self.packing]
        return [
            [replace(packed, name=qualified(own, packed.name)) for packed in part.packing]
            for own, part in self.parts.items()
        ]


def qualified(component: str, name: str) -> str:
    """Return the name of a component's input or output in a runtime of several; unchanged for an only component, ""."""
    return f"{component}/{name}" if component else name


def widened(shapes: Mapping[str, Shape], others: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
    """The row shapes that hold what `shapes` hold and all the others too."""
    wide = dict(shapes)
    for other in others:
        for name, shape in other.items():
            if shape != wide[name]:
                wide[name] = tuple(map(max, wide[name], shape))
    return wide


def row_bytes(layout: Layout, shapes: Mapping[str, Shape]) -> int:
    """Bytes of one row over all banks."""
    return sum(math.prod(shape) * layout.defaults[name].itemsize for name, shape in shapes.items())


@dataclass(frozen=True, eq=False)
class Bank:
    """Rows on the device.

    Args:
        layout: layout of the bundle.
        shapes: graph input -> shape of its rows.
        rows: how many there are, the base's included.
        values: graph input -> bank (T, ...) on the device.
        bindings: free IO bindings that have the banks bound; a run takes one and puts it back.
        parts: component -> the bank of its graph, in the same memory, where there are several components.
        arrays: graph input -> the memory of its bank, where that is the host's.
    """

    layout: Layout
    shapes: Mapping[str, Shape]
    rows: int
    values: Mapping[str, onnxruntime.OrtValue]
    bindings: deque[onnxruntime.IOBinding] = field(default_factory=deque)
    parts: Mapping[str, Bank] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        layout: Layout,
        shapes: Mapping[str, Shape],
        rows: int,
        device: str,
        *,
        old: Bank | None = None,
        moves: Mapping[int, int] | None = None,
    ) -> Bank:
        """A bank with the base in its first row and rows of another one, padded or cut; the others hold nothing yet.

        Args:
            layout: layout of the bundle.
            shapes: shapes of its rows; they must hold what the rows that move hold.
            rows: how many.
            device: "cpu", "cuda" or "cuda:1".
            old: the other one; it stays as it is.
            moves: row in `old` -> row here.
        """
        values, arrays = {}, {}
        for name, shape in shapes.items():
            array = _untouched((rows, *shape), layout.defaults[name].dtype)
            array[0] = slots.pad(layout.defaults[name], shape)
            if old is not None and moves:
                with device_lock.using(device):
                    own = old.values[name].numpy()
                common = tuple(slice(min(sizes)) for sizes in zip(shape, own.shape[1:], strict=True))
                for of, to in moves.items():
                    array[to][common] = own[of][common]
            with device_lock.using(device):
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array, *device_lock.place(device))
            if array.size and values[name].data_ptr() == array.ctypes.data:
                arrays[name] = array
        parts = {
            own: cls(
                part,
                {name: shapes[qualified(own, name)] for name in part.shapes},
                rows,
                {name: values[qualified(own, name)] for name in part.shapes},
            )
            for own, part in layout.parts.items()
        }
        return cls(layout, shapes, rows, values, parts=parts, arrays=arrays)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all banks."""
        return row_bytes(self.layout, self.shapes)

    def write(self, row: int, rows: Rows) -> None:
        """Put an adapter into a row that no run reads; what it leaves alone becomes the base's.

        Args:
            row: from 1.
            rows: graph input -> array no larger than a row; sizes are checked for all before a byte moves.
        """
        if not 0 < row < self.rows:
            raise IndexError(f"row {row} of a bank with {self.rows}; row 0 is the base")
        unknown = set(rows) - set(self.shapes)
        if unknown:
            raise KeyError(f"no bank for {sorted(unknown)[0]!r}")
        chosen = {name: rows.get(name, self.layout.defaults[name]) for name in self.shapes}
        for name, array in chosen.items():
            _check_row(name, array, self.shapes[name], self.layout.defaults[name].dtype)
        for name, array in chosen.items():
            if name in self.arrays:  # a view of ONNX Runtime's takes several times as long
                _write_padded(self.arrays[name][row], array)
            else:
                device_rows.write(device_rows.row_view(self.values[name], row), slots.pad(array, self.shapes[name]))


def _check_row(name: str, array: Array, shape: Shape, dtype: np.dtype[np.generic]) -> None:
    if array.dtype != dtype or array.ndim != len(shape) or any(map(operator.gt, array.shape, shape)):
        raise RunError(
            f"write a row of bank {name!r}",
            expected=f"{dtype} of at most {list(shape)}",
            got=f"{array.dtype} {list(array.shape)}",
        )


def _write_padded(row: Array, array: Array) -> None:
    """Copy an array to the start of a row, and zeros to the rest."""
    if row.shape != array.shape:
        row.fill(0)
        row = row[tuple([slice(size) for size in array.shape])]
    np.copyto(row, array)


def _untouched(shape: Shape, dtype: np.dtype[np.generic]) -> Array:
    """Zeros that take no memory until they are written: rows without an adapter cost nothing on the CPU."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    # Numpy's own would ask for huge pages, each of which is taken whole by the first row in it.
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
