"""A session of the banked graph, run through IO binding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime

from tpeft_deploy.bundle import slots
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import bind
from tpeft_deploy.tucker import Array

__all__ = ["Session", "check_index"]


class Session:
    """A banked graph on one device.

    Args:
        model: ONNX file; or a function that returns it, called with the first run, which opens the session then.
        sessions: makes the session.
    """

    def __init__(self, model: Path | Callable[[], Path], sessions: SessionFactory) -> None:
        self._model, self._sessions = model, sessions
        self._device = sessions.device
        self._place = device_lock.place(sessions.device)
        self._opening = threading.Lock()
        self._opened = sessions.open(model) if isinstance(model, Path) else None

    @property
    def is_open(self) -> bool:
        """Whether the session is in memory."""
        return self._opened is not None

    def run(
        self,
        bank: Bank,
        inputs: Mapping[str, Array],
        index: Array,
        options: onnxruntime.RunOptions | None = None,
    ) -> dict[str, Array]:
        """Run rows of a batch on rows of a bank.

        Args:
            bank: bank to serve from; safe to use from several threads.
            inputs: contiguous arrays by input name.
            index: int64 (1,) or (batch,): the bank row of the batch, or of each of its rows.
            options: options of this run; setting its `terminate` stops it.

        Returns:
            Output name -> new array.

        Raises:
            RunError: the bank has no such row.
        """
        index = check_index(bank.rows, index)  # a bound array must outlive the run, which these locals do
        with device_lock.using(self._device):
            return self._run(bank, inputs, index, options)

    @property
    def _session(self) -> onnxruntime.InferenceSession:
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    self._opened = self._sessions.open(self._model if isinstance(self._model, Path) else self._model())
        return self._opened

    @cached_property
    def _outputs(self) -> list[str]:
        return [output.name for output in self._session.get_outputs()]

    def _run(
        self, bank: Bank, inputs: Mapping[str, Array], index: Array, options: onnxruntime.RunOptions | None
    ) -> dict[str, Array]:
        try:
            binding = bank.bindings.pop()
        except IndexError:
            binding = self.bind(bank)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input(slots.INDEX, index)
        binding.clear_binding_outputs()  # else the last run's buffers would be written again, at their old shapes
        for name in self._outputs:
            binding.bind_output(name, *self._place)
        self._session.run_with_iobinding(binding, options)
        outputs = dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))
        bank.bindings.append(binding)
        return outputs

    def run_bound(self, binding: onnxruntime.IOBinding) -> None:
        """Run what is bound: inputs, and memory for all outputs."""
        self._session.run_with_iobinding(binding)

    def bind(self, bank: Bank | None) -> onnxruntime.IOBinding:
        """Return a binding that has a bank bound, if there is one, and nothing else."""
        binding = bind(self._session)
        for name, value in bank.values.items() if bank is not None else ():
            binding.bind_ortvalue_input(name, value)
        return binding


def check_index(rows: int, index: Array) -> Array:
    """Bank rows as a graph takes them.

    CUDA's Gather compares no index with the bank's size and reads what lies there; the CPU's counts negative ones from
    the end.

    Args:
        rows: number of rows of the bank.
        index: the bank row of a batch, or of each of its rows.

    Raises:
        RunError: the bank has no such row.
    """
    index = np.ascontiguousarray(index, dtype=np.int64)
    asked = index.tolist()
    if asked and not 0 <= min(asked) <= max(asked) < rows:
        outside = next(row for row in asked if not 0 <= row < rows)
        raise RunError("run rows of a bank", expected=f"bank rows 0..{rows - 1}", got=outside)
    return index
