"""A plain greedy loop over a decoder's graph in slot form: past and present are the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.proof.bundle_graphs import BANKED, banks

Array = np.ndarray[Any, Any]


class Loop:
    """Rows of a bundle's banked graph, each with a task of its own and its own part of every cache.

    Args:
        session: a graph in slot form.
        decoder: ports of the graph.
        shapes: input -> shape, of the caches.
        rows: number of rows.
        length: tokens that a cache holds.
        fed: further inputs.
        index: row of the banks for each row, of a banked graph.
        memory: each row's memory, of which all rows but the longest have anything behind them, and their lengths.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        decoder: DecoderPorts,
        shapes: Mapping[str, Sequence[Any]],
        rows: int,
        length: int,
        fed: Mapping[str, Array],
        index: Array | None,
        memory: Mapping[str, Array] | None = None,
    ) -> None:
        random = np.random.default_rng(0)
        self._session, self._decoder, self._index = session, decoder, index
        self._memory = memory or {}
        # What a cache holds behind a row's past must not matter.
        self.caches: dict[str, Array] = {
            past: random.standard_normal((rows, shapes[past][1], length, shapes[past][3])).astype(np.float32)
            for past, _ in decoder.caches
        }
        self._fed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in fed.items()}

    def run(self, rows: slice, tokens: Array, pasts: Sequence[int]) -> Array:
        """Logits of the last token of some rows; their caches gain the new tokens."""
        own, binding = self._decoder, self._session.io_binding()
        inputs = {own.tokens: tokens, own.lengths: np.array(pasts, np.int64)}
        if self._index is not None:
            inputs[slots.INDEX] = self._index[rows]
        inputs |= {name: array[rows] for name, array in self._memory.items()}
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self._fed.items():
            binding.bind_ortvalue_input(name, value)
        for past, present in own.caches:
            memory = self.caches[past][rows]
            place = ("cpu", 0, np.float32, list(memory.shape), memory.ctypes.data)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
        binding.bind_output(own.logits, "cpu")
        self._session.run_with_iobinding(binding)
        logits: Array = binding.copy_outputs_to_cpu()[-1]
        return logits

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[Array, Array]:
        """New tokens (rows, count) and their logits (rows, count, vocabulary).

        Each prompt is read alone, in two pieces; then all rows decode together.
        """
        first = []
        for row, prompt in enumerate(prompts):
            for start, end in ((0, 2), (2, len(prompt)))[: len(prompt) - 1 or 1]:
                logits = self.run(slice(row, row + 1), np.array([prompt[start:end]]), [start])
            first.append(logits[0])
        found = [np.stack(first)]
        for step in range(count - 1):
            pasts = [len(prompt) + step for prompt in prompts]
            found.append(self.run(slice(None), found[-1].argmax(-1)[:, None], pasts))
        logits = np.stack(found, 1)
        return logits.argmax(-1), logits


def bundle_loop(bundle: Bundle, tasks: Sequence[str], length: int, memory: Mapping[str, Array] | None = None) -> Loop:
    """The loop over the banked graph of a bundle, or of a component, its rows the tasks given."""
    fed, index = _banked(bundle, tasks)
    return _loop(bundle, BANKED, len(tasks), length, fed, index, memory)


def remembered(bundle: Bundle, tasks: Sequence[str], sources: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Memory of each row and its length, from the encoder of a bundle with the task of the row."""
    encoder, ports = bundle.components["encoder"], bundle.components["decoder"].manifest.decoder
    assert ports is not None
    session, (fed, index) = compare.open_session(encoder.path / BANKED), _banked(encoder, tasks)
    found = []
    for row, source in enumerate(sources):
        inputs = {name: array[None] for name, array in source.items()}
        found.append(session.run(list(ports.source_outputs), inputs | fed | {slots.INDEX: index[row : row + 1]}))
    lengths = np.array([row[0].shape[2] for row in found])
    random, memory = np.random.default_rng(1), {ports.memory_lengths: lengths}
    for place, name in enumerate(ports.memory):
        shape = (len(found), found[0][place].shape[1], lengths.max() + 2, found[0][place].shape[3])
        memory[name] = random.standard_normal(shape).astype(np.float32)
        for row, length in enumerate(lengths):
            memory[name][row, :, :length] = found[row][place][0]
    return memory


def _banked(bundle: Bundle, tasks: Sequence[str]) -> tuple[dict[str, Array], Array]:
    """Banks of the banked graph, and the row of each task in them."""
    adapters = {task: None if task == BASE_TASK else bundle.part(bundle.adapter(task)) for task in dict.fromkeys(tasks)}
    return banks(bundle, adapters)[BANKED], np.array([list(adapters).index(task) for task in tasks])


def folded_loop(bundle: Bundle, task: str, length: int, rows: int = 1) -> Loop:
    """The loop over the folded graph of a task."""
    return _loop(bundle, f"folded/{task}.onnx", rows, length, {}, None)


def _loop(
    bundle: Bundle, file: str, rows: int, length: int, fed: Mapping[str, Array], index: Array | None,
    memory: Mapping[str, Array] | None = None,
) -> Loop:  # fmt: skip
    decoder, shapes = bundle.manifest.decoder, {port.name: port.shape for port in bundle.manifest.inputs}
    assert decoder is not None
    return Loop(compare.open_session(bundle.path / file), decoder, shapes, rows, length, fed, index, memory)
