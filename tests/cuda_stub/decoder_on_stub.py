"""Generates with a bundle's decoder on the stub, then calls the decoder step by step; prints the calls as JSON.

LD_LIBRARY_PATH=STUB CUDA_STUB_LOG=FILE STUB/venv/bin/python -m tests.cuda_stub.decoder_on_stub BUNDLE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.gpu_fixed import Fixed, Place
from tests.cuda_stub.on_stub import ROWS, Log, bank_of, batch
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.bundle import slots
from tpeft_deploy.runtime.generation.decoder import BankedDecoder
from tpeft_deploy.runtime.sessions.providers import choose
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs

PROMPTS = [[5, 9, 31, 7, 12, 40, 3, 22, 8], [17, 2, 33], [1, 44, 6, 25, 38], [4] * 40, [9] * 17]
COUNT = 6


@contextmanager
def finite() -> Iterator[None]:
    """Zeros in the place of logits, which are what the memory held before: a generator refuses what is no number."""
    with ExitStack() as patched:
        for name in ("prefill", "decode"):
            own = getattr(BankedDecoder, name)
            zeros = lambda *given, own=own: np.zeros_like(own(*given))  # noqa: E731
            patched.enter_context(patch.object(BankedDecoder, name, zeros))
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
        calls: dict[str, Callable[[], object]] = {
            "prefill": lambda: decoder.prefill([1], np.arange(7)[None], 5, versions[1:2]),
            "decode": lambda: decoder.decode(rows.tolist(), rows, rows + 4, versions),
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
    return {"lengths": lengths, "reused": stats.reused_tokens, "block": block.nbytes, "calls": found}


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


def main(path: Path) -> None:
    """Print what is found."""
    log = Log()
    found = generated(path, log)
    found["recorded"] = [recorded(path, log, rows, chunk) for rows, chunk in ((ROWS, 1), (1, 4))]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
