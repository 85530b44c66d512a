"""An engine that waits for the test before each run, and an event loop with a clock that the test moves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tests.helpers.runtime.named_batcher import NamedBatcher
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.runtime.batching.collate import Outputs
from tpeft_deploy.tucker import Array

T = TypeVar("T")


MANIFEST = Manifest(
    *("net", "test", {}, {}, (), "each", ""),
    inputs=(Port("x", "float32", ("batch", 3)),),
    outputs=(Port("y", "float32", ("batch", 3)),),
    files={},
)


def rows(count: int, value: float = 1.0) -> dict[str, Array]:
    return {"x": np.full((count, 3), value, np.float32)}


class Gate:
    """An engine that waits for `open` before each run, adds the length of the task's name, and remembers its runs.

    Rows of task `bad` fail, and with them the whole batch; a run that is told to terminate fails like a session's.
    """

    def __init__(self, *, is_open: bool = True) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.runs: list[list[str]] = []
        if is_open:
            self.open.set()

    def __call__(self, inputs: Mapping[str, Array], tasks: Sequence[str], options: Any) -> Outputs:
        self.runs.append(list(tasks))
        self.entered.set()
        while not self.open.wait(0.001):
            if options.terminate:
                raise ValueError("terminated")
        if "bad" in tasks:
            raise ValueError("a bad row")
        return {"y": inputs["x"] + np.array([[len(str(task))] for task in tasks], np.float32)}


class Skipping(asyncio.SelectorEventLoop):
    """An event loop whose timers are due when a test says so."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped


def skip(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Skipping)
    loop.skipped += seconds


def run_skipping(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=Skipping) as runner:
        return runner.run(main)


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 100)
    gate.entered.clear()


async def waiting(own: NamedBatcher, count: int) -> None:
    while own.figures().waiting_requests != count:
        await asyncio.sleep(0.001)
