"""A session whose runs have fixed shapes and addresses, so that CUDA launches each as one recorded graph.

A graph repeats what was recorded, on the memory it was recorded with.  So inputs are copied into buffers of their own,
filled up to one of a few shapes (`buckets`), and a bank is part of the recording: its rows may be written, but another
bank needs other recordings.  On the CPU the same code runs without recording.
"""

from __future__ import annotations

import itertools
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
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.sessions.providers import GRAPH_ID, ORT_ERRORS, Choice, Cuda, control_flow, open_session
from tpeft_deploy.runtime.sessions.shape_buckets import Bucket, Buckets, Recent
from tpeft_deploy.tucker import Array

__all__ = ["Captured", "Policy"]

_NOT_CAPTURED = "-1"


class HasValues(Protocol):
    """A bank."""

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
    """

    buckets: int = 16
    graphs: int = 64


@dataclass
class _Shape:
    """A bucket once it has run: what its outputs are, and from its second run on its buffers."""

    outputs: Mapping[str, tuple[tuple[int, ...], int]]  # sizes, and ONNX's number of the dtype
    buffers: _Buffers | None = None


@dataclass
class _Buffers:
    binding: onnxruntime.IOBinding
    inputs: Mapping[str, onnxruntime.OrtValue]
    outputs: Mapping[str, onnxruntime.OrtValue]
    options: onnxruntime.RunOptions
    recorded: bool = False


class Captured:
    """A banked graph with buffers for each shape; safe to call from several threads, which take turns.

    A shape that comes once runs as it is.  When it comes again it gets buffers, and on CUDA its run is recorded.  Runs
    on a bank that has been replaced meanwhile are not recorded.

    Args:
        model: the ONNX file.
        choice: the device, from `providers.choose`.
        manifest: of the bundle.
        buckets: the shapes to fill up to; by default rows alone, up to 64.
        policy: how many shapes are kept.
        threads: intra-op threads; by default one per core.
        half: whether the model computes in 16 bits.
        memory_bytes: what the session's arena may take on CUDA.

    Raises:
        ProviderUnavailable: the session came up without CUDA although CUDA was chosen.
        RunError: the model cannot be recorded; the message says because of which nodes.
    """

    def __init__(
        self,
        model: Path,
        choice: Choice,
        manifest: Manifest,
        *,
        buckets: Buckets | None = None,
        policy: Policy | None = None,
        threads: int | None = None,
        half: bool = False,
        memory_bytes: int | None = None,
    ) -> None:
        self._model, self._choice, self._threads, self._half = model, choice, threads, half
        self._buckets = Buckets(manifest) if buckets is None else buckets
        self._policy = Policy() if policy is None else policy
        self._records = choice.device == "cuda"
        self._cuda = Cuda(memory_bytes=memory_bytes, graphs=self._records)
        self._shapes: Recent[Bucket, _Shape] = Recent(self._policy.buckets, self._release)
        self._bank: HasValues | None = None
        self._replaced: weakref.WeakSet[HasValues] = weakref.WeakSet()
        self._ids = itertools.count(1)
        self._recordings = 0
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
            bank: what to serve from.
            inputs: contiguous arrays by input name, checked against the manifest.
            index: int64 (1,) or (batch,): the bank row of the batch, or of each of its rows.
            options: of this run; setting its `terminate` stops it, unless it is a recorded one that has begun.

        Returns:
            Output name -> array of its own.

        Raises:
            RunError: CUDA could not record the run; the session is opened afresh for the next.
        """
        bucket = self._buckets.choose(inputs, index)
        filled = self._buckets.fill(bucket, inputs, index)
        cuts = self._buckets.cuts(inputs)
        return self._worker.submit(self._run, bank, bucket, filled, cuts, options).result()

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
            session = self._opened(self._choice, self._cuda)
        except (RuntimeError, *ORT_ERRORS) as error:
            if not self._records:
                raise
            found = control_flow(self._opened(Choice("cpu", "to look at its nodes"), self._cuda))
            raise self._unrecordable(found or [str(error).splitlines()[0][:300]]) from error
        found = control_flow(session) if self._records else []
        if found:
            raise self._unrecordable(found)
        self._session, self._recordings = session, 0
        self._outputs = [output.name for output in session.get_outputs()]
        return session

    def _opened(self, choice: Choice, cuda: Cuda) -> onnxruntime.InferenceSession:
        return open_session(self._model, choice, threads=self._threads, half=self._half, cuda=cuda)

    def _unrecordable(self, obstacles: list[str]) -> RunError:
        return RunError(
            f"record {self._model.name} as a CUDA graph",
            expected="a graph without If, Loop and Scan, all of it on CUDA",
            got=", ".join(obstacles),
            fix="Serve it without CUDA graphs; grouped convs of rows with adapters of their own need Scan.",
        )

    def _drop(self) -> None:
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
            if self._bank is not None:
                self._replaced.add(self._bank)
            self._shapes.clear()  # their buffers are bound together with the earlier bank
            self._bank = bank
        shape = self._shapes.get(bucket)
        # A run that was stopped while it was recorded would be repeated as far as it came.
        stopped = options is not None and options.terminate
        if bank is not self._bank or shape is None or stopped:
            values: Mapping[str, onnxruntime.OrtValue] = self._run_once(bank, filled, options)
            if bank is self._bank and shape is None:
                outputs = {name: (tuple(value.shape()), value.element_type()) for name, value in values.items()}
                self._shapes.put(bucket, _Shape(outputs))
        else:
            values = self._run_fixed(bank, shape, filled, options)
        return {name: self._own(value, cuts[name]) for name, value in values.items()}

    def _running(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise RuntimeError(f"a run of {self._model.name} without its session")
        return self._session

    def _run_once(
        self, bank: HasValues, filled: Mapping[str, Array], options: onnxruntime.RunOptions | None
    ) -> dict[str, onnxruntime.OrtValue]:
        session = self._running()
        binding = session.io_binding()
        for name, value in bank.values.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in filled.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, self._choice.device)
        if self._records:
            options = onnxruntime.RunOptions() if options is None else options
            options.add_run_config_entry(GRAPH_ID, _NOT_CAPTURED)
        session.run_with_iobinding(binding, options)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _run_fixed(
        self,
        bank: HasValues,
        shape: _Shape,
        filled: Mapping[str, Array],
        options: onnxruntime.RunOptions | None,
    ) -> Mapping[str, onnxruntime.OrtValue]:
        session = self._running()
        if shape.buffers is None:
            shape.buffers = self._make_buffers(bank, shape, filled)
        buffers = shape.buffers
        for name, array in filled.items():
            device_rows.write(buffers.inputs[name], array)
        if not self._records:
            session.run_with_iobinding(buffers.binding, options)
        elif buffers.recorded:
            session.run_with_iobinding(buffers.binding, buffers.options)
        else:
            self._record(session, buffers)
        return buffers.outputs

    def _record(self, session: onnxruntime.InferenceSession, buffers: _Buffers) -> None:
        try:
            with device_rows.exclusive:
                session.run_with_iobinding(buffers.binding, buffers.options)
        except (RuntimeError, *ORT_ERRORS) as error:  # the former is what a bound run raises
            self._drop()  # nothing says what state a failed recording leaves
            raise RunError(
                f"record {self._model.name} as a CUDA graph",
                problem=str(error).splitlines()[0][:300],
                fix="Serve it without CUDA graphs if this comes back.",
            ) from error
        buffers.recorded = True
        self._recordings += 1

    def _make_buffers(self, bank: HasValues, shape: _Shape, filled: Mapping[str, Array]) -> _Buffers:
        device, binding = self._choice.device, self._running().io_binding()
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
