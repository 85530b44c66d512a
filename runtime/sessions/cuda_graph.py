"""A session with runs of fixed shapes and addresses, so that CUDA launches each as one recorded graph.

A graph repeats what was recorded, on the memory it was recorded with.  So inputs are copied into separate buffers,
filled up to one of a few shapes (`buckets`), and a bank is part of the recording: its rows may be written, but another
bank needs other recordings.  On the CPU the same code runs without recording.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.sessions.banked import check_index
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import (
    GRAPH_ID,
    NOT_CAPTURED,
    ORT_ERRORS,
    bind,
    control_flow,
    nodes_on_cpu,
)
from tpeft_deploy.runtime.sessions.shape_buckets import Bucket, Buckets, Recent
from tpeft_deploy.tucker import Array

__all__ = ["Captured", "Policy"]

_log = logging.getLogger("tpeft_deploy.runtime")


class HasValues(Protocol):
    """A bank."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def values(self) -> Mapping[str, onnxruntime.OrtValue]:
        """Graph input -> tensor that stays at its address as long as the bank lives."""
        ...


@dataclass(frozen=True)
class Policy:
    """How many shapes are kept.

    Args:
        buckets: shapes with buffers; the least recently used give way.
        graphs: recordings until the session is opened afresh: not all of ONNX Runtime lets go of them before.
        failures: failed recordings in a row, of one shape or of all, after which it or all are not recorded any more.
        patience: how often a recording is put off because a session opens or closes, before it waits for that.
    """

    buckets: int = 16
    graphs: int = 64
    failures: int = 3
    patience: int = 8


@dataclass
class _Shape:
    """A bucket once it has run: what its outputs are, and from its second run on its buffers."""

    outputs: Mapping[str, tuple[tuple[int, ...], int]]  # sizes, and ONNX's number of the dtype
    buffers: _Buffers | None = None
    put_off: int = 0  # recordings, because the device was taken


@dataclass
class _Buffers:
    binding: onnxruntime.IOBinding
    inputs: Mapping[str, onnxruntime.OrtValue]
    outputs: Mapping[str, onnxruntime.OrtValue]
    options: onnxruntime.RunOptions
    recorded: bool = False


class Captured:
    """A banked graph with buffers for each shape; safe to call from several threads, which take turns.

    A shape that comes once runs as it is.  When it comes again it gets buffers, and on CUDA its run is recorded, alone
    on the device (`device_lock`).  Runs on a bank that has been replaced meanwhile are not recorded.  Where a recording
    fails all the same, the request is answered by a plain run of a fresh session.

    Args:
        model: ONNX file.
        sessions: opens the session, again whenever its recordings have to go.
        manifest: inputs and outputs of the bundle.
        buckets: shapes to fill up to; by default rows alone, up to 64.
        policy: how many shapes are kept.

    Raises:
        ProviderUnavailable: the session came up without CUDA although CUDA was chosen.
        RunError: the model cannot be recorded; the message says because of which nodes.
    """

    def __init__(
        self,
        model: Path,
        sessions: SessionFactory,
        manifest: Manifest,
        *,
        buckets: Buckets | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._model = model
        self._buckets = Buckets(manifest) if buckets is None else buckets
        self._policy = Policy() if policy is None else policy
        self._records = sessions.device != "cpu"
        self._sessions = sessions.with_cuda(graphs=self._records)
        self._shapes: Recent[Bucket, _Shape] = Recent(self._policy.buckets, self._release)
        self._bank: HasValues | None = None
        self._replaced: weakref.WeakSet[HasValues] = weakref.WeakSet()
        self._ids = itertools.count(1)
        self._recordings = 0
        self._failures = 0  # in a row
        self._failed: Recent[Bucket, int] = Recent(64)  # failures of shapes
        self._device = device_lock.using(sessions.device)
        # Graphs, streams and handles belong to the thread that made them.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tpeft-captured")
        self._session: onnxruntime.InferenceSession | None = None
        try:
            self._worker.submit(self._open).result()
        except BaseException:
            self._worker.shutdown()
            raise

    def run(
        self,
        bank: HasValues,
        inputs: Mapping[str, Array],
        index: Array,
        options: onnxruntime.RunOptions | None = None,
    ) -> dict[str, Array]:
        """Run rows of a batch on rows of a bank.

        Args:
            bank: bank to serve from.
            inputs: contiguous arrays by input name, checked against the manifest.
            index: int64 (1,) or (batch,): the bank row of the batch, or of each of its rows.
            options: options of this run; setting its `terminate` stops it, unless it is a recorded one that has begun.

        Returns:
            Output name -> new array.

        Raises:
            RunError: the bank has no such row.
        """
        index = check_index(bank.rows, index)
        bucket = self._buckets.choose(inputs, index)
        filled = self._buckets.fill(bucket, inputs, index)
        cuts = self._buckets.cuts(inputs)
        return self._worker.submit(self._run, bank, bucket, filled, cuts, options).result()

    @property
    def recordings(self) -> int:
        """Runs recorded by the present session."""
        return self._recordings

    def close(self) -> None:
        """Let go of the session and its thread, once the runs in flight are done."""
        try:
            dropping = self._worker.submit(self._drop)
        except RuntimeError:
            return  # closed already
        dropping.result()
        self._worker.shutdown()

    def _open(self) -> onnxruntime.InferenceSession:
        try:
            session = self._sessions.open(self._model)
        except (RuntimeError, *ORT_ERRORS) as error:
            if not self._records:
                raise
            raise self._unrecordable(self._obstacles(error)) from error
        found = control_flow(session) if self._records else []
        if found:
            del session
            raise self._unrecordable(found)
        self._session, self._recordings = session, 0
        self._outputs = [output.name for output in session.get_outputs()]
        return session

    def _obstacles(self, refusal: Exception) -> list[str]:
        """Why ONNX Runtime refuses to record, by the nodes of a session that it need not record."""
        session = self._sessions.with_cuda(graphs=False, placement=True).open(self._model)
        found = control_flow(session)
        if found:
            return found
        # By operator: sizes are computed on the CPU by dozens of nodes, which would hide the one that is copied to.
        on_cpu = sorted({node.split()[0] for node in nodes_on_cpu(session)})
        return [str(refusal).splitlines()[0][:300], f"with nodes on the CPU ({', '.join(on_cpu) or 'none'})"]

    def _unrecordable(self, obstacles: list[str]) -> RunError:
        scans = any(obstacle.startswith("Scan ") for obstacle in obstacles)
        hint = "; grouped convs of rows with separate adapters need Scan" if scans else ""
        return RunError(
            f"record {self._model.name} as a CUDA graph",
            expected="a graph without If, Loop and Scan, and without copies between CUDA and the CPU",
            got=", ".join(obstacles),
            fix=f"Serve it without CUDA graphs{hint}.",
        )

    def _drop(self) -> None:
        with device_lock.opening(self._sessions.device):
            self._shapes.clear()
            self._bank = None
            self._session = None

    def _release(self, shape: _Shape) -> None:
        # New in ONNX Runtime 1.32; providers without it do nothing, which is why recordings are counted.
        release = getattr(self._session, "release_captured_graph", None)
        if shape.buffers is not None and shape.buffers.recorded and release is not None:
            release(int(shape.buffers.options.get_run_config_entry(GRAPH_ID)))

    def _run(
        self,
        bank: HasValues,
        bucket: Bucket,
        filled: Mapping[str, Array],
        cuts: Mapping[str, tuple[slice, ...]],
        options: onnxruntime.RunOptions | None,
    ) -> dict[str, Array]:
        if self._session is None or self._recordings >= self._policy.graphs:
            self._drop()
            self._open()
        if bank is not self._bank and bank not in self._replaced:
            self._take(bank)
        shape = self._shapes.get(bucket) if bank is self._bank else None
        # A run that was stopped while it was recorded would be repeated as far as it came.
        stopped = options is not None and options.terminate
        values: Mapping[str, onnxruntime.OrtValue] | None = None
        if shape is not None and not stopped:
            values = self._run_fixed(bank, bucket, shape, filled, options)
        if self._session is None:  # a recording failed: the same request on a fresh session
            shape = None  # which holds what is bound to the old one
            self._open()
            self._bank = bank
        with self._device:
            if values is None:
                values = self._run_once(bank, filled, options)
                if bank is self._bank and shape is None:
                    self._shapes.put(bucket, _Shape(_ports(values)))
            return {name: self._own(value, cuts[name]) for name, value in values.items()}

    def _take(self, bank: HasValues) -> None:
        if self._bank is not None:
            self._replaced.add(self._bank)
        with self._device:
            self._shapes.clear()  # their buffers are bound together with the earlier bank
        self._bank = bank

    def _running(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise RuntimeError(f"a run of {self._model.name} without its session")
        return self._session

    def _run_once(
        self, bank: HasValues, filled: Mapping[str, Array], options: onnxruntime.RunOptions | None
    ) -> dict[str, onnxruntime.OrtValue]:
        session = self._running()
        binding = bind(session)
        for name, value in bank.values.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in filled.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, *device_lock.place(self._sessions.device))
        if self._records and options is None:  # those of a batch say so already; to say it twice prints a warning
            options = onnxruntime.RunOptions()
            options.add_run_config_entry(GRAPH_ID, NOT_CAPTURED)
        session.run_with_iobinding(binding, options)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _run_fixed(
        self,
        bank: HasValues,
        bucket: Bucket,
        shape: _Shape,
        filled: Mapping[str, Array],
        options: onnxruntime.RunOptions | None,
    ) -> Mapping[str, onnxruntime.OrtValue] | None:
        """Run with the shape's buffers; None where it has to be recorded first and cannot be."""
        session = self._running()
        recorded = shape.buffers is not None and shape.buffers.recorded
        if self._records and not recorded and not self._may_record(bucket):
            return None
        with self._device:
            if shape.buffers is None:
                shape.buffers = self._make_buffers(bank, shape, filled)
            buffers = shape.buffers
            for name, array in filled.items():
                device_rows.write(buffers.inputs[name], array)
            if not self._records or recorded:
                session.run_with_iobinding(buffers.binding, buffers.options if recorded else options)
        if self._records and not recorded and not self._record(bucket, shape, buffers):
            return None
        return buffers.outputs

    def _may_record(self, bucket: Bucket) -> bool:
        return max(self._failures, self._failed.get(bucket) or 0) < self._policy.failures

    def _record(self, bucket: Bucket, shape: _Shape, buffers: _Buffers) -> bool:
        with device_lock.DEVICE.recording(wait=shape.put_off >= self._policy.patience) as alone:
            if not alone:
                shape.put_off += 1
                return False
            try:
                self._running().run_with_iobinding(buffers.binding, buffers.options)
            except (RuntimeError, *ORT_ERRORS) as error:  # the former is what a bound run raises
                failure = str(error).splitlines()[0][:300]
            else:
                buffers.recorded = True
                self._recordings += 1
                self._failures = 0
                return True
        self._fail(bucket, failure)
        return False

    def _fail(self, bucket: Bucket, failure: str) -> None:
        """Note a failed recording, and let go of the session: nothing says what state it is in."""
        if not self._failures:
            _log.warning("record %s as a CUDA graph: %s; answered by a plain run", self._model.name, failure)
        self._failures += 1
        self._failed.put(bucket, (self._failed.get(bucket) or 0) + 1)
        if self._failures == self._policy.failures:
            _log.warning("%s is not recorded any more: %d recordings in a row failed", self._model.name, self._failures)
        self._drop()

    def _make_buffers(self, bank: HasValues, shape: _Shape, filled: Mapping[str, Array]) -> _Buffers:
        device, binding = self._sessions.device, bind(self._running())
        inputs = {name: device_rows.allocate(array.shape, str(array.dtype), device) for name, array in filled.items()}
        outputs = {
            name: device_rows.allocate_as(sizes, element_type, device)
            for name, (sizes, element_type) in shape.outputs.items()
        }
        for name, value in {**bank.values, **inputs}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = onnxruntime.RunOptions()
        if self._records:
            options.add_run_config_entry(GRAPH_ID, str(next(self._ids)))
        return _Buffers(binding, inputs, outputs, options)

    def _own(self, value: onnxruntime.OrtValue, cut: tuple[slice, ...]) -> Array:
        """The request's part, without the buffer: on the CPU `numpy` may be what the next run writes."""
        array: Array = value.numpy()
        part = array[cut]
        return array if self._records and part.shape == array.shape else np.array(part)


def _ports(values: Mapping[str, onnxruntime.OrtValue]) -> dict[str, tuple[tuple[int, ...], int]]:
    return {name: (tuple(value.shape()), value.element_type()) for name, value in values.items()}
