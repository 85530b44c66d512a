"""Generates with a bundle's decoder on the stub, then calls the decoder step by step; prints the calls as JSON.

LD_LIBRARY_PATH=STUB CUDA_STUB_LOG=FILE STUB/venv/bin/python -m tests.cuda_stub.decoder_on_stub BUNDLE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.gpu_fixed import Fixed, Place
from tests.cuda_stub.on_stub import ROWS, Log, bank_of, batch
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.bundle import slots
from tpeft_deploy.runtime.generation.sampling import Sampler, Sampling
from tpeft_deploy.runtime.generation.top_logits.device_logits import TopLogits, choices
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import Cuda, choose, nodes_on_cpu
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs
from tpeft_deploy.tucker import Array

PROMPTS = [[5, 9, 31, 7, 12, 40, 3, 22, 8], [17, 2, 33], [1, 44, 6, 25, 38], [4] * 40, [9] * 17]
COUNT = 6


@contextmanager
def finite() -> Iterator[None]:
    """Numbers in the place of logits, which are what the memory held before: a generator refuses what is no number."""
    own = TopLogits.run

    def run(top: TopLogits, rows: int, temperatures: Array) -> tuple[Array, Array, Array]:
        found = own(top, rows, temperatures)
        assert [array.shape for array in found] == [(rows, top.kept), (rows, top.kept), (rows, temperatures.shape[1])]
        largest = np.tile(-np.arange(top.kept, dtype=np.float32), (rows, 1))
        return largest, np.tile(np.arange(top.kept), (rows, 1)), np.full(temperatures.shape, 2.0)

    with patch.object(TopLogits, "run", run):
        yield


def generated(path: Path, log: Log) -> dict[str, Any]:
    """Numbers of tokens of prompts on several tasks at once, given twice, and the calls of each call of the decoder."""
    with Runtime(path, provider="cuda") as runtime, finite():
        tasks = [*runtime.tasks, "base"] * len(PROMPTS)
        prompts = [prompt for prompt in PROMPTS for _ in range(len(tasks) // len(PROMPTS))]
        tokens = [runtime.generate(prompts, tasks=tasks, max_new_tokens=COUNT) for _ in range(2)]
        stats = runtime.generation()
        assert stats is not None
        decoder: Any = runtime._generation._generator()._decoder
        versions = [runtime._generation.acquire(task) for task in tasks[:3]]
        block, rows = decoder.save(0, 0, 16), np.arange(3)
        logits = decoder.decode(rows.tolist(), rows, rows + 4, versions)
        samplers = [Sampler(Sampling(), [1]) for _ in rows]
        calls: dict[str, Callable[[], object]] = {
            "prefill": lambda: decoder.prefill([1], np.arange(7)[None], 5, versions[1:2]),
            "decode": lambda: decoder.decode(rows.tolist(), rows, rows + 4, versions),
            "choose": lambda: [choose() for choose in choices(logits, samplers, scored=True) if choose is not None],
            "whole": logits.read,
            "save": lambda: decoder.save(1, 3, 16),
            "restore": lambda: decoder.restore(2, 16, block),
            "move": lambda: decoder.move(2, 0, 16),
        }
        found = {}
        for name, call in calls.items():
            call()
            log.take()
            call()
            found[name] = dict(log.take())
        for version in versions:
            version.release()
    lengths = sorted({len(own) for answer in tokens for own in answer})
    kept = decoder.top.kept
    return {"lengths": lengths, "reused": stats.reused_tokens, "block": block.nbytes, "kept": kept, "calls": found}


def recorded(path: Path, log: Log, rows: int, chunk: int) -> dict[str, int]:
    """The calls of the fifth run of the banked graph, which is recorded; the pasts change meanwhile."""
    bundle = Bundle.open(path)
    manifest, ports = bundle.manifest, bundle.manifest.decoder
    assert ports is not None
    file = ServedGraphs.on("cuda", manifest).banked
    bank = bank_of(bundle, file)
    inputs: dict[str, Any] = {name: array[:rows] for name, array in batch(bundle).items()}
    inputs |= {ports.tokens: np.zeros((rows, chunk), np.int64), slots.INDEX: np.arange(1, rows + 1)}
    fixed = Fixed(Place(path, choose("cuda"), 0.0), path / file, inputs | dict(bank.values), graphs=True)
    for past in range(4):
        fixed.inputs[ports.lengths].update_inplace(np.full(rows, past))
        fixed()
    log.take()
    fixed()
    return dict(log.take())


def on_cpu(path: Path) -> list[str]:
    """Nodes of the choice graph that run on the CPU."""
    bundle = Bundle.open(path)
    ports = bundle.manifest.decoder
    assert ports is not None
    sessions = SessionFactory.of(bundle.manifest, choose("cuda"), cuda=Cuda(placement=True))
    return nodes_on_cpu(sessions.open(path / ports.choice))


def main(path: Path) -> None:
    """Print what is found."""
    log = Log()
    found = generated(path, log)
    found["recorded"] = [recorded(path, log, rows, chunk) for rows, chunk in ((ROWS, 1), (1, 4))]
    found["choice on cpu"] = on_cpu(path)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
