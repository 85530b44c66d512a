"""The decoder of a bundle: runs of its banked graph on the caches of slots, each row on the version of its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.engine import translated
from tpeft_deploy.runtime.generation.kv_cache import CacheBlock, DeviceCaches, HostCaches, KvPlan
from tpeft_deploy.runtime.generation.prefixes import Sized
from tpeft_deploy.runtime.generation.sequence import Sequence as State
from tpeft_deploy.runtime.generation.slot_adapters import SlotAdapters
from tpeft_deploy.runtime.generation.sources.features import FeatureInput, Features, Images, stacked
from tpeft_deploy.runtime.generation.sources.source import SourceEncoder
from tpeft_deploy.runtime.generation.top_logits.device_logits import BFLOAT16, DeviceLogits, TopLogits, widened
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.tucker import Array

__all__ = ["BankedDecoder", "Decoder", "ResidentVersion"]

_MOST_RUNS = 256  # bindings that are kept


class Decoder(Protocol):
    """The device: `slots` caches, each with room for `length` tokens.  Called from one thread, one call at a time."""

    slots: int
    length: int
    vocabulary: int

    def enter(self, slot: int, sequence: State) -> None:
        """Take in the inputs of a sequence that got a slot, before any of its tokens is computed there."""

    def prefill(
        self, slots: Sequence[int], tokens: Array, past: int, versions: Sequence[Any], features: Sequence[Any]
    ) -> Array | DeviceLogits:
        """Compute tokens [n, length] behind the first `past` of slots; returns logits of the last [n, vocabulary].

        Several slots follow each other, and their past is 0.
        """

    def decode(
        self, slots: Sequence[int], tokens: Array, pasts: Array, versions: Sequence[Any]
    ) -> Array | DeviceLogits:
        """Compute one token for each of some slots, returns logits [n, vocabulary].

        The slots are 0..n-1, but for those of sequences that just could not be moved.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the cache of the first `length` tokens of a slot."""

    def save(self, slot: int, start: int, length: int) -> Sized:
        """Copy the cache of some tokens of a slot out of it."""

    def restore(self, slot: int, start: int, block: Any) -> None:
        """Copy a saved cache to a place in a slot."""


class ResidentVersion:
    """A version that a generation holds on the device: it is no eviction victim, as others would wait for minutes.

    Args:
        held: the version, acquired; released with this.
        residency: residency of the version.
    """

    def __init__(self, held: Held, residency: Residency) -> None:
        self.version = held.versions[0]
        self._held = held
        self._residency = residency
        residency.occupy(self.version, 1)

    @property
    def key(self) -> str:
        """Digest of the adapter; empty for the base."""
        return self.version.digest

    def release(self) -> None:
        """Give the version back."""
        self._residency.occupy(self.version, -1)
        self._held.release()


class _Run:
    """A binding for some slots, with the memory that is bound to it.

    Args:
        decoder: decoder.
        first: slot of the first row.
        rows: number of rows.
        bank: bank to bind.
    """

    def __init__(self, decoder: BankedDecoder, first: int, rows: int, bank: Bank) -> None:
        ports = decoder.ports
        self.bank = bank
        self.binding = decoder.session.bind(bank if decoder.adapters is None else None)
        self.inputs: dict[str, Array] = {
            ports.tokens: np.zeros((rows, 1), np.int64),
            ports.lengths: np.zeros(rows, np.int64),
        }
        if decoder.adapters is None:
            self.inputs[slots.INDEX] = np.zeros(rows, np.int64)
        else:
            decoder.adapters.bind(self.binding, first, rows)
        decoder.caches.bind(self.binding, ports.caches, first, rows)
        if ports.memory:
            self.inputs[ports.memory_lengths] = np.zeros(rows, np.int64)
        self.logits: Array = np.empty((0, 0), decoder.logits_dtype)  # on the device, with a choice graph
        if decoder.top is not None:
            decoder.top.bind(self.binding.bind_output, ports.logits, rows)
        else:
            self.logits = np.empty((rows, decoder.vocabulary), decoder.logits_dtype)
            kind = BFLOAT16 if self.logits.dtype == np.uint16 else self.logits.dtype.type
            self.binding.bind_output(ports.logits, "cpu", 0, kind, self.logits.shape, self.logits.ctypes.data)
        self.features = None if decoder.features is None else decoder.features.bound(rows)
        for name in self.inputs:
            self.bind(name)

    def bind(self, name: str) -> None:
        """Bind the present memory of an input."""
        array = self.inputs[name]
        self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)


class BankedDecoder:
    """A bundle's banked graph in slot form; called from one thread.

    Logits are valid until the next call.

    Args:
        manifest: manifest of a bundle with a decoder.
        session: session of the banked graph, or of the one for gathered rows.
        residency: residency of the versions.
        plan: sizes of the caches.
        device: memory device, as ONNX Runtime names it.
        component: component of the graph; empty for the only one.
        gathered: whether the graph reads rows that are gathered already, on the CPU.
        source: computes what the graph reads beside tokens, where it does.
        choice: session of the choice graph, with which logits stay on the device.
    """

    def __init__(
        self,
        manifest: Manifest,
        session: Session,
        residency: Residency,
        plan: KvPlan,
        device: str,
        component: str = "",
        *,
        gathered: bool = False,
        source: SourceEncoder | Images | None = None,
        choice: onnxruntime.InferenceSession | None = None,
    ) -> None:
        if manifest.decoder is None:
            raise InputError(f"decode with bundle {manifest.name!r}", expected="one with a decoder", got="one without")
        self.ports = manifest.decoder
        self.slots, self.length, self.vocabulary = plan.slots, plan.length, self.ports.vocabulary
        self.session = session
        self.adapters = SlotAdapters(plan.slots) if gathered else None
        self.caches = HostCaches(plan) if device == "cpu" else DeviceCaches(plan, device)
        self.features = FeatureInput.of(manifest)
        dtype = next(port.dtype for port in manifest.outputs if port.name == self.ports.logits)
        self.logits_dtype: np.dtype[Any] = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        self._name = manifest.name
        self.top: TopLogits | None = None
        if choice is not None:
            self.top = TopLogits(self._name, choice, self.ports, plan.slots, self.logits_dtype, device)
        self._device = device
        self._residency = residency
        self._component = component
        self._source = source
        self._runs: dict[tuple[int, int], _Run] = {}  # by first slot and number of rows

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters that are copied to slots."""
        return 0 if self.adapters is None else self.adapters.nbytes

    def enter(self, slot: int, sequence: State) -> None:
        """Compute what a sequence that got a slot reads beside tokens; memory after each preemption again."""
        version: Any = sequence.version
        if isinstance(self._source, Images):
            self._source.compute(sequence, version.version)
        elif self._source is not None:
            self.caches.fill(slot, self._source.compute(sequence.inputs, version.version))

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Array,
        past: int,
        versions: Sequence[ResidentVersion],
        features: Sequence[Features | None] = (),
    ) -> Array | DeviceLogits:
        """Compute tokens (n, length) behind the first `past` of slots; returns logits of the last (n, vocabulary).

        Several slots follow each other, and their past is 0.
        """
        bank, rows = self._rows(slots, versions)
        return self._run(bank, slots[0], tokens, past, rows, stacked(features, past, past + tokens.shape[1]))

    def decode(
        self, slots: Sequence[int], tokens: Array, pasts: Array, versions: Sequence[ResidentVersion]
    ) -> Array | DeviceLogits:
        """Compute one token for each of some slots, ascending; returns logits [n, vocabulary]."""
        bank, found = self._rows(slots, versions)
        rows = slots[-1] + 1
        if rows == len(slots):
            return self._run(bank, 0, tokens[:, None], pasts, found)
        # Slots between hold nothing: they run on the base, and what that writes to their first token matters to none.
        taken = list(slots)
        whole = np.zeros((3, rows), np.int64)
        whole[:, taken] = tokens, pasts, found
        return self._run(bank, 0, whole[0][:, None], whole[1], whole[2])[taken]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the cache of the first `length` tokens of a slot."""
        self.caches.move(source, target, length)

    def save(self, slot: int, start: int, length: int) -> CacheBlock:
        """Copy the cache of some tokens of a slot out of it."""
        return self.caches.save(slot, start, length)

    def restore(self, slot: int, start: int, block: CacheBlock) -> None:
        """Copy a saved cache to a place in a slot."""
        self.caches.restore(slot, start, block)

    def _rows(self, slots: Sequence[int], versions: Sequence[ResidentVersion]) -> tuple[Bank, list[int]]:
        """The bank and the rows of versions in it, which their slots have too where the graph reads those."""
        own = [version.version for version in versions]
        bank, rows = self._residency.rows(own, self._component)
        if self.adapters is not None:
            for slot, version, row in zip(slots, own, rows, strict=True):
                self.adapters.place(bank, slot, version, row)
        return bank, rows

    def _run(
        self,
        bank: Bank,
        first: int,
        tokens: Array,
        pasts: Array | int,
        index: Array | list[int],
        features: Array | None = None,
    ) -> Array | DeviceLogits:
        with translated(self._name), device_lock.using(self._device):
            run = self._bound(bank, first, len(tokens))
            inputs = run.inputs
            if inputs[self.ports.tokens].shape != tokens.shape:
                inputs[self.ports.tokens] = np.empty(tokens.shape, np.int64)
                run.bind(self.ports.tokens)
            inputs[self.ports.tokens][:] = tokens
            inputs[self.ports.lengths][:] = pasts
            if self.ports.memory:
                inputs[self.ports.memory_lengths][:] = self.caches.filled[first : first + len(tokens)]
            if slots.INDEX in inputs:
                inputs[slots.INDEX][:] = index
            if run.features is not None:
                run.features.bind(run.binding, tokens.shape[1], features)
            if self._device != "cpu":
                for name in inputs:  # binding copies to the device
                    run.bind(name)
            self.session.run_bound(run.binding)
        if self.top is not None:
            return DeviceLogits(self.top, range(len(tokens)))
        return widened(run.logits)

    def _bound(self, bank: Bank, first: int, rows: int) -> _Run:
        run = self._runs.get((first, rows))
        if run is not None and run.bank is bank:
            return run
        if run is not None or len(self._runs) > _MOST_RUNS:
            self._runs.clear()  # all of an earlier bank, which they keep, or too many
        run = self._runs[first, rows] = _Run(self, first, rows, bank)
        return run
