"""Sessions with everything on the device, timing that takes turns, and what a check says."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime

from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.sessions.providers import Choice, Cuda, open_session
from tpeft_deploy.tucker import Array

Value: TypeAlias = Array | onnxruntime.OrtValue


class NeedsCuda(Exception):
    """A check has nothing to ask of a CPU."""


@dataclass(frozen=True)
class Place:
    """Where the models are, what runs them, and how long one timing may take."""

    path: Path
    choice: Choice
    seconds: float

    @property
    def cuda(self) -> bool:
        return self.choice.device == "cuda"

    @property
    def ways(self) -> dict[str, bool]:
        """How to run: as it is, and on CUDA recorded."""
        return {"plain": False, "recorded": True} if self.cuda else {"plain": False}

    def need_cuda(self) -> None:
        if not self.cuda:
            raise NeedsCuda

    def graph(self, name: str) -> Path:
        return self.path / "graphs" / f"{name}.onnx"

    def on_device(self, value: Value) -> onnxruntime.OrtValue:
        if isinstance(value, onnxruntime.OrtValue):
            return value
        placed = device_rows.allocate(value.shape, str(value.dtype), self.choice.device)
        device_rows.write(placed, np.ascontiguousarray(value))
        return placed

    def open(self, model: Path, *, graphs: bool = False) -> onnxruntime.InferenceSession:
        return open_session(model, self.choice, cuda=Cuda(graphs=graphs and self.cuda))


@dataclass
class Report:
    """What a check found: figures, and claims that hold or not."""

    figures: dict[str, float | str] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)

    def claim(self, text: str, value: float, limit: float, *, at_least: bool) -> None:
        """A claim about a figure; it is recorded, not asserted."""
        holds = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        self.claims.append({"claim": text, "value": value, "limit": f"{sign} {limit:g}", "holds": bool(holds)})

    def milliseconds(self, times: Mapping[str, float]) -> None:
        self.figures.update({f"{name}, ms": 1e3 * seconds for name, seconds in times.items()})


class Fixed:
    """One session bound to device memory once; with `graphs` its run is recorded and repeated on CUDA.

    Args:
        place: gives the device.
        model: the ONNX file, or an open session.
        fed: input -> array, or a value on the device that others write.
        outputs: output -> value on the device to write; by default of its own.
        graphs: whether to record.
    """

    def __init__(
        self,
        place: Place,
        model: Path | onnxruntime.InferenceSession,
        fed: Mapping[str, Value],
        *,
        outputs: Mapping[str, onnxruntime.OrtValue] | None = None,
        graphs: bool = False,
    ) -> None:
        device = place.choice.device
        self.session = place.open(model, graphs=graphs) if isinstance(model, Path) else model
        self.inputs = {name: place.on_device(value) for name, value in fed.items()}
        self._binding = self.session.io_binding()
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        names = [output.name for output in self.session.get_outputs()]
        if outputs is None:
            for name in names:
                self._binding.bind_output(name, device)
            self.session.run_with_iobinding(self._binding, self._options(graphs, "-1"))
            found = zip(names, self._binding.get_outputs(), strict=True)
            outputs = {name: device_rows.allocate_as(v.shape(), v.element_type(), device) for name, v in found}
            self._binding.clear_binding_outputs()
        self.outputs = outputs
        for name in names:
            self._binding.bind_ortvalue_output(name, outputs[name])
        self._run_options = self._options(graphs, "1")

    def __call__(self) -> None:
        self.session.run_with_iobinding(self._binding, self._run_options)

    def answer(self) -> Array:
        """A copy of the first output after a run."""
        self()
        return np.array(next(iter(self.outputs.values())).numpy())

    @staticmethod
    def _options(graphs: bool, number: str) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if graphs:
            options.add_run_config_entry("gpu_graph_id", number)
        return options


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, taking turns for about that long, after three rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(own) for name, own in times.items()}


def error(got: Array, expected: Array) -> float:
    """Relative, in the Euclidean norm."""
    assert got.shape == expected.shape, f"shape {got.shape} in place of {expected.shape}"
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(got - wide) / np.linalg.norm(wide))


def device_bytes() -> int:
    """Memory in use on device 0, by whomever."""
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        code = library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        if code:
            raise OSError(f"cudaMemGetInfo returned {code}")
        return total.value - free.value
    raise OSError("no libcudart to ask for memory")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
