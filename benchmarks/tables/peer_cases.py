"""One batch of rows with several adapters, as each toolkit that runs in a process answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle, islice
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.runtime import as_by_default
from benchmarks.tables.peer_models import RANK, Work
from tpeft_deploy import Runtime
from tpeft_deploy.tucker import Array

__all__ = ["INSTALL", "OURS", "Answer", "Batch", "Difference", "answers", "check", "oracle"]

OURS = "this toolkit, one mixed batch"
POLYLORA = "polylora, one mixed batch"
INSTALL = {POLYLORA: "not installed: pip install --no-deps polylora==0.1.1"}

Answer = Callable[[], Array]
Inputs = Mapping[str, Array]


class Difference(Exception):
    """A toolkit's answer is not PEFT's."""


@dataclass(frozen=True)
class Batch:
    """Rows, and the adapter of each; those of one adapter lie apart, as requests arrive.

    Args:
        inputs: input name -> array of all rows.
        tasks: adapter of each row.
    """

    inputs: Inputs
    tasks: Sequence[str]

    @classmethod
    def of(cls, work: Work, tokens: int, count: int) -> Batch:
        """A batch with so many different adapters."""
        return cls(work.inputs(tokens), list(islice(cycle(work.tasks[:count]), work.size.rows)))

    @property
    def distinct(self) -> list[str]:
        return list(dict.fromkeys(self.tasks))

    def groups(self, run: Mapping[str, Callable[[Inputs], Array]]) -> Answer:
        """The batch as one run per adapter; splitting it and putting it together is part of the work."""

        def answer() -> Array:
            found: dict[int, Array] = {}
            for task in self.distinct:
                rows = [row for row, own in enumerate(self.tasks) if own == task]
                answered = run[task]({name: array[rows] for name, array in self.inputs.items()})
                found.update(zip(rows, answered, strict=True))
            return np.stack([found[row] for row in range(len(self.tasks))])

        return answer


@torch.inference_mode()
def _torch(model: Callable[..., Any], inputs: Inputs, **more: Any) -> Array:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    found: Array = model(**tensors, **more).numpy()
    return found


def oracle(work: Work, batch: Batch) -> Array:
    """PEFT's answer, each row alone with its adapter set."""
    found = []
    for row, task in enumerate(batch.tasks):
        work.peft.set_adapter(task)
        found.append(_torch(work.peft, {name: array[row : row + 1] for name, array in batch.inputs.items()}))
    return np.concatenate(found)


def check(name: str, answer: Answer, expected: Array, limit: float = 1e-4) -> None:
    """Compare a whole answer with PEFT's.

    Raises:
        Difference: they are further apart than rounding explains.
    """
    found = answer()
    if found.shape != expected.shape:
        raise Difference(f"{name}: expected shape {expected.shape}, got {found.shape}")
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error < limit:
        raise Difference(f"{name}: expected PEFT's answer within {limit:g} of its largest value, got {error:g}")


@contextmanager
def answers(work: Work, batch: Batch, threads: int) -> Iterator[dict[str, Answer | str]]:
    """Name -> how a toolkit answers the batch, or, in words, why it does not."""
    with ExitStack() as stack:
        yield {**stack.enter_context(_ours(work, batch, threads)), **_onnxruntime(work, batch, threads)} | _peft(
            work, batch
        )


@contextmanager
def _ours(work: Work, batch: Batch, threads: int) -> Iterator[dict[str, Answer | str]]:
    """The runtime with its defaults, and one that may fold hot tasks."""
    path, manifest = work.bundle.path, work.bundle.manifest
    (output,) = (port.name for port in manifest.outputs)
    room = (len(batch.distinct) + 1) * manifest.weight_bytes
    with (
        Runtime(path, provider="cpu", threads=threads) as runtime,
        Runtime(path, provider="cpu", threads=threads, folded_bytes=room) as hot,
        asyncio.Runner() as loop,
    ):
        for task in batch.distinct:
            hot.pin(task, folded=True)

        def one(task: str, inputs: Inputs) -> Array:
            return runtime.run(inputs, task)[output]

        def folded(task: str, inputs: Inputs) -> Array:
            return hot.run(inputs, task)[output]

        rows = [{name: array[row : row + 1] for name, array in batch.inputs.items()} for row in range(len(batch.tasks))]

        async def requests() -> Array:
            asked = (runtime.infer(row, task) for row, task in zip(rows, batch.tasks, strict=True))
            return np.concatenate([found[output] for found in await asyncio.gather(*asked)])

        yield {
            OURS: lambda: np.asarray(runtime.run(batch.inputs, tasks=batch.tasks)[output]),
            "this toolkit, a request for each row": lambda: loop.run(requests()),
            "this toolkit, a run for each adapter": batch.groups({task: partial(one, task) for task in batch.distinct}),
            "this toolkit, folded, a run for each adapter": batch.groups(
                {task: partial(folded, task) for task in batch.distinct}
            ),
        }


def _onnxruntime(work: Work, batch: Batch, threads: int) -> dict[str, Answer | str]:
    """ONNX Runtime with what its users have: a model for each adapter, or its adapter files."""
    files = work.folded(batch.distinct)
    sessions = {task: as_by_default(file, threads) for task, file in zip(batch.distinct, files, strict=True)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # else a warning for each factor
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = work.bundle.path
    shared = onnxruntime.InferenceSession(path / "factored.onnx", options, providers=["CPUExecutionProvider"])
    kept = {}
    for task in batch.distinct:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(path / "adapters" / task / work.bundle.digest(task) / "adapter.onnx_adapter"))
        active = onnxruntime.RunOptions()
        active.add_active_adapter(adapter)
        kept[task] = adapter, active  # options hold no reference to their adapter

    def adapted(task: str, inputs: Inputs) -> Array:
        found: Array = shared.run(None, inputs, kept[task][1])[0]
        return found

    def single(task: str, inputs: Inputs) -> Array:
        found: Array = sessions[task].run(None, inputs)[0]
        return found

    return {
        "ONNX Runtime, a session for each adapter": batch.groups(
            {task: partial(single, task) for task in batch.distinct}
        ),
        "ONNX Runtime, add_active_adapter": batch.groups({task: partial(adapted, task) for task in batch.distinct}),
    }


def _peft(work: Work, batch: Batch) -> dict[str, Answer | str]:
    """PEFT in torch, and polylora, which takes a PEFT model's adapters."""
    model = work.peft
    merged = {task: work.merged(task) for task in batch.distinct}

    def chosen(task: str, inputs: Inputs) -> Array:
        model.set_adapter(task)
        return _torch(model, inputs)

    return {
        "PEFT, set_adapter": batch.groups({task: partial(chosen, task) for task in batch.distinct}),
        "PEFT, adapter_names": lambda: _torch(model, batch.inputs, adapter_names=list(batch.tasks)),
        "PEFT, a merged model for each adapter": batch.groups(
            {task: partial(_torch, merged[task]) for task in batch.distinct}
        ),
        POLYLORA: _polylora(work, batch),
    }


def _polylora(work: Work, batch: Batch) -> Answer | str:
    if find_spec("polylora") is None:
        return INSTALL[POLYLORA]
    if "input_ids" not in batch.inputs:
        return "linear layers only"
    library = import_module("polylora")
    config = library.PolyLoraConfig(
        max_gpu_adapters=work.size.tasks, max_rank=RANK, target_modules=list(work.kind.layers)
    )
    model = library.PolyLoraModel(work.base(), config).eval()
    for task in batch.distinct:
        model.load_adapter_from_disk(task, work.adapter(task))
    return lambda: _torch(model, batch.inputs, adapter_ids=list(batch.tasks))
