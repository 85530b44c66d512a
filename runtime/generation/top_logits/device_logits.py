"""Logits of a decoder in the device's memory, and the graph that finds the largest of each row there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.engine import translated
from tpeft_deploy.runtime.generation.probabilities import divisor
from tpeft_deploy.runtime.generation.sampling import Sampler, Token, peaks
from tpeft_deploy.runtime.generation.top_logits.exact import TopRow, choose, decides, needs_mass
from tpeft_deploy.runtime.sessions.providers import bind
from tpeft_deploy.tucker import Array

__all__ = ["BFLOAT16", "DeviceLogits", "TopLogits", "choices", "widened"]

BFLOAT16 = 16  # ONNX's number of the type, which numpy does not have


def widened(logits: Array) -> Array:
    """Logits as numbers: bfloat16 travels as the bits of uint16."""
    return (logits.astype(np.uint32) << 16).view(np.float32) if logits.dtype == np.uint16 else logits


class TopLogits:
    """Memory for the logits of all slots on a device, and a session of the choice graph.

    Args:
        name: name of the bundle, for messages.
        session: session of `choice.onnx`.
        ports: ports of the decoder.
        slots: number of slots.
        dtype: dtype of the logits, uint16 for bfloat16.
        device: memory device, as ONNX Runtime names it.
    """

    def __init__(
        self,
        name: str,
        session: onnxruntime.InferenceSession,
        ports: DecoderPorts,
        slots: int,
        dtype: np.dtype[Any],
        device: str,
    ) -> None:
        self._name = name
        self._session = session
        self._vocabulary = ports.vocabulary
        self._kind = BFLOAT16 if dtype == np.uint16 else dtype.type
        self._device = device
        self._logits = device_rows.allocate((slots, ports.vocabulary), dtype.name, device)
        self.kept = int(session.get_outputs()[0].shape[-1])

    def bind(self, call: Callable[..., object], name: str, rows: int) -> None:
        """Bind the first rows of the memory.

        Args:
            call: a binding's `bind_output` or `bind_input`.
            name: port.
            rows: number of rows.
        """
        place = device_lock.place(self._device)
        call(name, *place, self._kind, (rows, self._vocabulary), self._logits.data_ptr())

    def run(self, rows: int, temperatures: Array) -> tuple[Array, Array, Array]:
        """Find the largest logits of the first rows, and sums over each row.

        Args:
            rows: number of rows.
            temperatures: float32 (rows, number of sums).

        Returns:
            The largest logits (rows, kept) and their tokens, and the sums (rows, number of sums).
        """
        binding = bind(self._session)
        self.bind(binding.bind_input, "logits", rows)
        found: tuple[Array, Array, Array] = (
            np.empty((rows, self.kept), np.float32),
            np.empty((rows, self.kept), np.int64),
            np.empty(temperatures.shape, np.float64),
        )
        with translated(self._name), device_lock.using(self._device):
            binding.bind_cpu_input("temperatures", temperatures)  # copies to the device
            for name, array in zip(("top_logits", "top_tokens", "sums"), found, strict=True):
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        return found

    def read(self, row: int, rows: int = 1) -> Array:
        """Copy whole logits of some rows to host memory."""
        view = device_rows.part_view(self._logits, row * self._vocabulary, (rows, self._vocabulary))
        return widened(device_rows.read(view))


class DeviceLogits:
    """Logits of a run of the decoder, valid until the next run.

    Args:
        top: memory with the logits.
        rows: rows of the run, ascending.
    """

    def __init__(self, top: TopLogits, rows: Sequence[int]) -> None:
        self._top = top
        self._rows = list(rows)

    def __getitem__(self, places: Sequence[int]) -> DeviceLogits:
        """Some of the rows."""
        return DeviceLogits(self._top, [self._rows[place] for place in places])

    @property
    def kept(self) -> int:
        """Number of largest logits of each row."""
        return self._top.kept

    def read(self) -> Array:
        """Copy all rows to host memory."""
        logits: Array = self._top.read(0, self._rows[-1] + 1)[self._rows]
        return logits

    def row(self, place: int) -> Array:
        """Copy one row to host memory."""
        logits: Array = self._top.read(self._rows[place])[0]
        return logits

    def largest(self, samplers: Sequence[Sampler | None], scored: bool) -> list[TopRow]:
        """Find the largest logits of each row.

        Args:
            samplers: sampler of each row; None where no token is wanted.
            scored: whether log-probabilities are wanted.
        """
        hows = [None if sampler is None else sampler.sampling for sampler in samplers]
        divisors = [divisor(how) if how is not None and needs_mass(how) else np.float32(1) for how in hows]
        columns = 2 if scored and any(each != 1 for each in divisors) else 1
        temperatures = np.ones((self._rows[-1] + 1, columns), np.float32)
        temperatures[self._rows, -1] = divisors
        logits, tokens, sums = self._top.run(len(temperatures), temperatures)
        order = tokens.argsort(-1)
        tokens, logits = np.take_along_axis(tokens, order, -1), np.take_along_axis(logits, order, -1)
        return [
            TopRow(tokens[row], logits[row], float(sums[row, 0]) if scored else np.nan, float(sums[row, -1]))
            for row in self._rows
        ]


def choices(
    logits: Array | DeviceLogits, samplers: Sequence[Sampler | None], scored: bool
) -> list[Callable[[], Token] | None]:
    """For each row, a function that chooses its token; to be called before the decoder's next run.

    Args:
        logits: logits of the rows.
        samplers: sampler of each row; None where no token is wanted, for which there is no function.
        scored: whether log-probabilities are wanted.
    """
    wanted = [sampler for sampler in samplers if sampler is not None]
    if not wanted:
        return [None] * len(samplers)
    if isinstance(logits, DeviceLogits):
        if all(decides(sampler, logits.kept) for sampler in wanted):
            found = enumerate(zip(samplers, logits.largest(samplers, scored), strict=True))
            return [
                partial(_chosen, logits, place, row, sampler) if sampler else None for place, (sampler, row) in found
            ]
        logits = logits.read()
    rows = zip(samplers, logits, peaks(logits, scored), strict=True)
    return [partial(sampler.choose, row, peak) if sampler else None for sampler, row, peak in rows]


def _chosen(logits: DeviceLogits, place: int, top: TopRow, sampler: Sampler) -> Token:
    token = choose(top, sampler)
    return sampler.choose(logits.row(place)) if token is None else token
