"""The few shapes that runs with fixed buffers have: requests are filled up to the next one, and answers cut back.

Rows are filled up to powers of two with zeros, which take the base's adapter, bank row 0.  A free size that may be
filled up (`Manifest.paddable`) goes up to the next allowed length.  Every other free size has a bucket for each value.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.tucker import Array

__all__ = ["Bucket", "Buckets", "Recent", "ladder"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Bucket:
    """One set of shapes.

    Args:
        sizes: name of a free size -> its value, sorted by name.
        indexed: how many adapter rows are named: one for all rows, or one for each.
    """

    sizes: tuple[tuple[str, int], ...]
    indexed: int


class Buckets:
    """Which shapes a model is run at.

    Args:
        manifest: manifest of the bundle.
        max_rows: up to how many rows are filled up; larger batches run unpadded.
        lengths: sizes to which paddable axes are padded; longer ones run unpadded.  None are
            safe to assume: a model has a longest input that its graph does not tell, see `ladder`.
    """

    def __init__(self, manifest: Manifest, *, max_rows: int = 64, lengths: Sequence[int] = ()) -> None:
        self._manifest = manifest
        self._max_rows = max_rows
        self._lengths = sorted(lengths)
        batch = manifest.batch_axis
        # Models with rows that cannot mix may not be filled up with rows either.
        self._batch = batch if manifest.rows == "each" and batch is not None and self._cut_back(batch) else None
        self._paddable = frozenset(name for name in manifest.paddable if self._cut_back(name))
        if any(port.rows == "joint" for port in manifest.outputs):  # what is filled up would change them
            self._batch, self._paddable = None, frozenset()

    def choose(self, inputs: Mapping[str, Array], index: Array) -> Bucket:
        """The bucket of a request that was checked."""
        sizes = self._sizes(inputs)
        whole = {name: self._filled(name, size) for name, size in sizes.items()}
        batch = self._manifest.batch_axis
        indexed = 1 if len(index) == 1 or batch is None else whole[batch]
        return Bucket(tuple(sorted(whole.items())), indexed)

    def fill(self, bucket: Bucket, inputs: Mapping[str, Array], index: Array) -> dict[str, Array]:
        """The inputs at the bucket's shapes, with the index of adapters under its name.

        Args:
            bucket: from `choose`.
            inputs: contiguous arrays by input name.
            index: int64 (1,) or (rows,).

        Returns:
            Contiguous arrays; those that have the shape already are not copied.
        """
        sizes = dict(bucket.sizes)
        filled = {
            port.name: _filled_up(port, inputs[port.name], sizes, self._manifest.batch_axis)
            for port in self._manifest.inputs
        }
        filled[slots.INDEX] = slots.pad(np.ascontiguousarray(index, np.int64), (bucket.indexed,))
        return filled

    def cuts(self, inputs: Mapping[str, Array]) -> dict[str, tuple[slice, ...]]:
        """Cut each output at the bucket's shapes to the request's rows and sizes."""
        own = {name: size for name, size in self._sizes(inputs).items() if name in self._paddable | {self._batch}}
        return {
            port.name: tuple(slice(own[size]) if size in own else slice(None) for size in port.shape)
            for port in self._manifest.outputs
        }

    def _filled(self, name: str, size: int) -> int:
        if name == self._batch and size <= self._max_rows:
            return min(1 << (size - 1).bit_length(), self._max_rows)
        if name in self._paddable:
            return next((length for length in self._lengths if length >= size), size)
        return size

    def _sizes(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        return {
            name: size
            for port in self._manifest.inputs
            for name, size in zip(port.shape, inputs[port.name].shape, strict=True)
            if isinstance(name, str)
        }

    def _cut_back(self, name: str) -> bool:
        """Whether every output and input size that depends on a free size is that size itself."""
        ports = [*self._manifest.inputs, *self._manifest.outputs]
        free = [size for port in ports for size in port.shape if isinstance(size, str)]
        return all(size == name for size in free if name in _NAME.findall(size))


class Recent(Generic[K, V]):
    """The entries that were used last; older ones are let go.

    Args:
        size: how many.
        dropped: told each entry that goes.
    """

    def __init__(self, size: int, dropped: Callable[[V], object] = lambda _: None) -> None:
        self._size = size
        self._dropped = dropped
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The entry, which is now the one used last."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: K, entry: V) -> None:
        """Add an entry, or replace it."""
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._dropped(self._entries.popitem(last=False)[1])

    def clear(self) -> None:
        """Let go of all."""
        while self._entries:
            self._dropped(self._entries.popitem()[1])


def ladder(limit: int, first: int = 16) -> list[int]:
    """Lengths to fill up to: powers of two and the halves between them, so that at most half as much is added.

    Args:
        limit: the longest input that the model takes, which is the last length.
        first: the shortest.
    """
    lengths, length = [], first
    while length < limit:
        lengths += [length, length * 3 // 2]
        length *= 2
    return [*(length for length in lengths if length < limit), limit]


def _filled_up(port: Port, array: Array, sizes: Mapping[str, int], batch: str | None) -> Array:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in port.shape)
    if array.shape == shape:
        return array
    filled = np.zeros(shape, array.dtype)
    if port.pad is not None:
        # The request's own rows get longer with what the port says; new rows stay zeros.
        own = zip(port.shape, array.shape, strict=True)
        filled[tuple(slice(size) if name == batch else slice(None) for name, size in own)] = port.pad
    filled[tuple(slice(size) for size in array.shape)] = array
    return filled
