"""Memory for the keys and values of all slots: how much of it there is, and copies within, out of and into it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import CapacityError, InputError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.tucker import Array

__all__ = ["CacheBlock", "DeviceCaches", "HostCaches", "KvCaches", "KvPlan"]

_SLOTS = 8
_BYTES = 256 * 2**20
_TOKENS = 2048
_BFLOAT16 = 16  # ONNX's number of the type, which numpy does not have


@dataclass(frozen=True)
class KvPlan:
    """Sizes of the caches.

    Attributes:
        slots: number of slots.
        length: tokens that a slot holds.
        shapes: cache input -> shape of a slot, (heads, length, head size).
        dtypes: cache input -> numpy's name of the dtype, or "bfloat16".
    """

    slots: int
    length: int
    shapes: Mapping[str, tuple[int, int, int]]
    dtypes: Mapping[str, str]

    @classmethod
    def of(cls, manifest: Manifest, kv_bytes: int | None, max_tokens: int | None) -> Self:
        """Plan the caches of a bundle's decoder.

        Args:
            manifest: manifest of a bundle with a decoder.
            kv_bytes: bytes of all slots; by default those of 8 slots, 256 MiB at most but one slot at least.
            max_tokens: tokens that a slot holds; by default 2,048, or what the model can if that is less.

        Raises:
            InputError: the model does not have so many positions.
            CapacityError: no slot fits.
        """
        decoder = manifest.decoder
        doing = f"open bundle {manifest.name!r} for generation"
        if decoder is None:
            raise InputError(doing, expected="a bundle with a decoder", got="one without")
        length = min(decoder.positions, _TOKENS) if max_tokens is None else max_tokens
        if not 1 <= length <= decoder.positions:
            raise InputError(doing, expected=f"max_tokens from 1 to {decoder.positions}", got=length)
        ports = {port.name: port for port in manifest.inputs}
        shapes, dtypes = {}, {}
        for past, _ in decoder.caches:
            _, heads, _, size = ports[past].shape
            shapes[past] = (int(heads), length, int(size))
            dtypes[past] = ports[past].dtype
        plan = cls(1, length, shapes, dtypes)
        if kv_bytes is None:
            slots = max(1, min(_SLOTS, _BYTES // plan.nbytes))
        elif not (slots := kv_bytes // plan.nbytes):
            raise CapacityError(
                doing,
                expected=f"room for a sequence of {length:,} tokens, {plan.nbytes:,} bytes",
                got=f"kv_bytes of {kv_bytes:,}",
                fix="Give the runtime more kv_bytes, or fewer max_tokens.",
            )
        return cls(slots, length, shapes, dtypes)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * sum(math.prod(shape) * self.stored(name).itemsize for name, shape in self.shapes.items())

    def stored(self, name: str) -> np.dtype[Any]:
        """Dtype of the memory of a cache: numpy has no bfloat16, so its bits are uint16."""
        return np.dtype(np.uint16 if self.dtypes[name] == "bfloat16" else self.dtypes[name])


@dataclass(frozen=True)
class CacheBlock:
    """Keys and values of some tokens, in host memory; one array (heads, tokens, head size) for each cache."""

    parts: Sequence[Array]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(part.nbytes for part in self.parts)


class KvCaches(ABC):
    """The caches of all slots, each of one layer's keys or values in one tensor (slots, heads, length, head size).

    Args:
        plan: sizes.
    """

    device: str

    def __init__(self, plan: KvPlan) -> None:
        self.plan = plan

    def bind(self, binding: onnxruntime.IOBinding, caches: Sequence[tuple[str, str]], first: int, rows: int) -> None:
        """Bind the past and present of slots to the same memory.

        Args:
            binding: binding of a session.
            caches: pairs of an input and an output.
            first: slot of the first row.
            rows: number of rows.
        """
        for past, present in caches:
            shape, dtype = self.plan.shapes[past], self.plan.stored(past)
            kind = _BFLOAT16 if self.plan.dtypes[past] == "bfloat16" else dtype.type
            address = self._address(past) + first * math.prod(shape) * dtype.itemsize
            for bind, name in ((binding.bind_input, past), (binding.bind_output, present)):
                bind(name, *device_lock.place(self.device), kind, [rows, *shape], address)

    @abstractmethod
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""

    @abstractmethod
    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy some tokens of a slot to host memory."""

    @abstractmethod
    def restore(self, slot: int, start: int, block: CacheBlock) -> None:
        """Copy saved tokens to a place in a slot."""

    @abstractmethod
    def _address(self, name: str) -> int:
        """Address of a cache's tensor."""


class HostCaches(KvCaches):
    """Caches in host memory, which take none before tokens are written."""

    device = "cpu"

    def __init__(self, plan: KvPlan) -> None:
        super().__init__(plan)
        self._arrays = {name: np.zeros((plan.slots, *shape), plan.stored(name)) for name, shape in plan.shapes.items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        for array in self._arrays.values():
            array[target, :, :length] = array[source, :, :length]

    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy some tokens of a slot."""
        return CacheBlock([array[slot, :, start : start + length].copy() for array in self._arrays.values()])

    def restore(self, slot: int, start: int, block: CacheBlock) -> None:
        """Copy saved tokens to a place in a slot."""
        for array, part in zip(self._arrays.values(), block.parts, strict=True):
            array[slot, :, start : start + part.shape[1]] = part

    def _address(self, name: str) -> int:
        return int(self._arrays[name].ctypes.data)


class DeviceCaches(KvCaches):
    """Caches in a device's memory; copies are one for each head.

    Args:
        plan: sizes.
        device: memory device, as ONNX Runtime names it.
    """

    def __init__(self, plan: KvPlan, device: str) -> None:
        super().__init__(plan)
        self.device = device
        self._values = {
            name: device_rows.allocate((plan.slots, *shape), plan.stored(name).name, device)
            for name, shape in plan.shapes.items()
        }

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        for name in self._values:
            views = (self._heads(name, slot, 0, length) for slot in (target, source))
            for to, own in zip(*views, strict=True):
                device_rows.copy(to, own)

    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy some tokens of a slot to host memory."""
        return CacheBlock(
            [
                np.stack([device_rows.read(view) for view in self._heads(name, slot, start, length)])
                for name in self._values
            ]
        )

    def restore(self, slot: int, start: int, block: CacheBlock) -> None:
        """Copy saved tokens to a place in a slot."""
        for name, part in zip(self._values, block.parts, strict=True):
            for view, own in zip(self._heads(name, slot, start, part.shape[1]), part, strict=True):
                device_rows.write(view, own)

    def _heads(self, name: str, slot: int, start: int, length: int) -> Iterator[onnxruntime.OrtValue]:
        """The tokens of each head, which lie apart."""
        heads, tokens, size = self.plan.shapes[name]
        for head in range(heads):
            offset = ((slot * heads + head) * tokens + start) * size
            yield device_rows.part_view(self._values[name], offset, (length, size))

    def _address(self, name: str) -> int:
        return int(self._values[name].data_ptr())
