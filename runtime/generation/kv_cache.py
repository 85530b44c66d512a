"""Memory for the keys and values of all slots: how much of it there is, and copies within, out of and into it.

Decoders of encoder-decoders read keys and values of their source too: the memory of a slot, written once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import CapacityError, InputError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.tucker import Array

__all__ = ["CacheBlock", "DeviceCaches", "HostCaches", "KvCaches", "KvPlan"]

_SLOTS = 8
_BYTES = 256 * 2**20
_TOKENS = 2048
_SOURCE = 512
_BFLOAT16 = 16  # ONNX's number of the type, which numpy does not have


@dataclass(frozen=True)
class KvPlan:
    """Sizes of the caches.

    Attributes:
        slots: number of slots.
        length: tokens that a slot holds.
        shapes: cache input -> shape of a slot, (heads, length, head size).
        dtypes: cache or memory input -> numpy's name of the dtype, or "bfloat16".
        memory: memory input -> shape of a slot, (heads, source, head size).
    """

    slots: int
    length: int
    shapes: Mapping[str, tuple[int, int, int]]
    dtypes: Mapping[str, str]
    memory: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        kv_bytes: int | None,
        max_tokens: int | None,
        max_source: int | None = None,
        source: Manifest | None = None,
    ) -> Self:
        """Plan the caches of a bundle's decoder.

        Args:
            manifest: manifest of a bundle with a decoder.
            kv_bytes: bytes of all slots; by default those of 8 slots, 256 MiB at most but one slot at least.
            max_tokens: tokens that a slot holds; by default 2,048, or what the model can if that is less.
            max_source: positions of a slot's memory; by default the model's, or 512 where that has no bound.
            source: manifest of the component that computes the memory.

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
        memory = _memory(doing, decoder, ports, max_source, source)
        dtypes |= {name: ports[name].dtype for name in memory}
        plan = cls(1, length, shapes, dtypes, memory)
        if kv_bytes is None:
            slots = max(1, min(_SLOTS, _BYTES // plan.nbytes))
        elif not (slots := kv_bytes // plan.nbytes):
            raise CapacityError(
                doing,
                expected=f"room for a sequence of {length:,} tokens, {plan.nbytes:,} bytes",
                got=f"kv_bytes of {kv_bytes:,}",
                fix="Give the runtime more kv_bytes, or fewer max_tokens.",
            )
        return cls(slots, length, shapes, dtypes, memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        tensors = {**self.shapes, **self.memory}
        return self.slots * sum(math.prod(shape) * self.stored(name).itemsize for name, shape in tensors.items())

    @property
    def source(self) -> int:
        """Positions of a slot's memory."""
        return next((size for _, size, _ in self.memory.values()), 0)

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

    Attributes:
        filled: valid positions of each slot's memory; at least one, so that no slot's attention is without any.
    """

    device: str

    def __init__(self, plan: KvPlan) -> None:
        self.plan = plan
        self.filled = np.ones(plan.slots, np.int64)

    def bind(self, binding: onnxruntime.IOBinding, caches: Sequence[tuple[str, str]], first: int, rows: int) -> None:
        """Bind the past and present of slots to the same memory, and what they read of their sources.

        Args:
            binding: binding of a session.
            caches: pairs of an input and an output.
            first: slot of the first row.
            rows: number of rows.
        """
        plan, place = self.plan, device_lock.place(self.device)
        outputs = {past: [(binding.bind_output, present)] for past, present in caches}
        for past, shape in (*plan.shapes.items(), *plan.memory.items()):
            dtype = plan.stored(past)
            kind = _BFLOAT16 if plan.dtypes[past] == "bfloat16" else dtype.type
            address = self._address(past) + first * math.prod(shape) * dtype.itemsize
            for bind, name in ((binding.bind_input, past), *outputs.get(past, ())):
                bind(name, *place, kind, [rows, *shape], address)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot, and its memory, to another."""
        valid = int(self.filled[source])
        for names, count in ((self.plan.shapes, length), (self.plan.memory, valid)):
            for name in names:
                self._copy(name, source, target, count)
        self.filled[target] = valid

    def fill(self, slot: int, parts: Sequence[Array]) -> None:
        """Write the memory of a slot.

        Args:
            slot: slot.
            parts: for each memory in the order of the plan (heads, positions, head size).

        Raises:
            InputError: there are too many positions, or none.
        """
        valid = parts[0].shape[1]
        if not 1 <= valid <= self.plan.source:
            raise InputError(
                "read the source of a sequence",
                expected=f"1 to {self.plan.source} positions",
                got=valid,
                fix="Shorten it, or give the runtime a larger max_source.",
            )
        for name, part in zip(self.plan.memory, parts, strict=True):
            self._write(name, slot, 0, part)
        self.filled[slot] = valid

    def restore(self, slot: int, start: int, block: CacheBlock) -> None:
        """Copy saved tokens to a place in a slot."""
        for name, part in zip(self.plan.shapes, block.parts, strict=True):
            self._write(name, slot, start, part)

    @abstractmethod
    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy some tokens of a slot to host memory."""

    @abstractmethod
    def _copy(self, name: str, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot to another."""

    @abstractmethod
    def _write(self, name: str, slot: int, start: int, part: Array) -> None:
        """Write positions of a slot, (heads, positions, head size)."""

    @abstractmethod
    def _address(self, name: str) -> int:
        """Address of a cache's tensor."""


class HostCaches(KvCaches):
    """Caches in host memory, which take none before tokens are written."""

    device = "cpu"

    def __init__(self, plan: KvPlan) -> None:
        super().__init__(plan)
        tensors = {**plan.shapes, **plan.memory}
        self._arrays = {name: np.zeros((plan.slots, *shape), plan.stored(name)) for name, shape in tensors.items()}

    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy some tokens of a slot."""
        return CacheBlock([self._arrays[name][slot, :, start : start + length].copy() for name in self.plan.shapes])

    def _copy(self, name: str, source: int, target: int, length: int) -> None:
        array = self._arrays[name]
        array[target, :, :length] = array[source, :, :length]

    def _write(self, name: str, slot: int, start: int, part: Array) -> None:
        self._arrays[name][slot, :, start : start + part.shape[1]] = part

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
            for name, shape in (*plan.shapes.items(), *plan.memory.items())
        }
        for name, shape in plan.memory.items():  # what stands behind the valid positions has to be finite
            for slot in range(plan.slots):
                self._write(name, slot, 0, np.zeros(shape, plan.stored(name)))

    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy some tokens of a slot to host memory."""
        return CacheBlock(
            [
                np.stack([device_rows.read(view) for view in self._heads(name, slot, start, length)])
                for name in self.plan.shapes
            ]
        )

    def _copy(self, name: str, source: int, target: int, length: int) -> None:
        views = (self._heads(name, slot, 0, length) for slot in (target, source))
        for to, own in zip(*views, strict=True):
            device_rows.copy(to, own)

    def _write(self, name: str, slot: int, start: int, part: Array) -> None:
        for view, own in zip(self._heads(name, slot, start, part.shape[1]), part, strict=True):
            device_rows.write(view, own)

    def _heads(self, name: str, slot: int, start: int, length: int) -> Iterator[onnxruntime.OrtValue]:
        """The tokens of each head, which lie apart."""
        heads, tokens, size = self.plan.shapes.get(name) or self.plan.memory[name]
        for head in range(heads):
            offset = ((slot * heads + head) * tokens + start) * size
            yield device_rows.part_view(self._values[name], offset, (length, size))

    def _address(self, name: str) -> int:
        return int(self._values[name].data_ptr())


def _memory(
    doing: str, decoder: DecoderPorts, ports: Mapping[str, Port], wanted: int | None, source: Manifest | None
) -> dict[str, tuple[int, int, int]]:
    """Shapes of the memory of a slot: of the model's size where the graphs fix it."""
    if not decoder.memory:
        return {}
    sizes = {ports[name].shape[2] for name in decoder.memory}
    if source is not None:
        sizes |= {port.shape[2] for port in source.outputs if port.name in decoder.source_outputs}
    fixed = {size for size in sizes if not isinstance(size, str)}
    most = min(fixed, default=None)
    limit = decoder.source_positions or math.inf
    size = int(most or min(_SOURCE, limit)) if wanted is None else wanted
    if not 1 <= size <= limit or (most is not None and size != most):
        expected = most or ("at least 1" if limit == math.inf else f"1 to {limit}")
        raise InputError(doing, expected=f"max_source of {expected}", got=size)
    return {name: (int(ports[name].shape[1]), size, int(ports[name].shape[3])) for name in decoder.memory}
