"""What a batcher holds of its callers: their requests, and the way back to their event loops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnxruntime

from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import DeadlineExceeded
from tpeft_deploy.runtime.batching.collate import Form, Task
from tpeft_deploy.runtime.batching.policy import Request
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.sessions.providers import GRAPH_ID, NOT_CAPTURED
from tpeft_deploy.tucker import Array

if TYPE_CHECKING:
    from tpeft_deploy.runtime.batching.pieces import Whole

__all__ = ["Answer", "Answered", "Call", "Run", "answer"]

_log = logging.getLogger("tpeft_deploy.runtime")

Answered = dict[str, Array | list[Array]]


@dataclass(eq=False, slots=True)
class Call:
    """One request of one caller, or a piece of it; `gone` once the caller does not wait any more, or has its answer."""

    request: Request[Form]
    inputs: Mapping[str, Array]
    tasks: Sequence[Task]  # one for all rows, or, with `apart`, one a row
    apart: bool
    outputs: Sequence[Port]  # that are asked for
    timeout: float | None
    future: asyncio.Future[Answered]
    timing: Timing | None = None
    gone: bool = False
    whole: Whole | None = None  # of a piece
    start: int = 0  # its first row in that

    @property
    def together(self) -> Sequence[Call]:
        """All pieces of the caller's request; itself where it is not cut."""
        return (self,) if self.whole is None else self.whole.pieces

    def release(self) -> None:
        """Let go of what leads back here: inputs should go without waiting for a collection.

        A future holds its exception, that the frames it was raised in, and those this call.
        """
        if self.whole is None:
            del self.future
            return
        for piece in self.whole.pieces:
            del piece.future
        self.whole.release()

    @property
    def name(self) -> str:
        """What it runs on, for messages."""
        first = f"task {self.tasks[0]!r}"
        return first if len(set(self.tasks)) == 1 else f"{len(set(self.tasks))} tasks, {first} first,"

    @property
    def per_row(self) -> list[Task]:
        """A task for each row."""
        return list(self.tasks) if self.apart else self.request.rows * list(self.tasks)

    def overdue(self) -> DeadlineExceeded:
        """The error for a call whose time is over."""
        rows = self.request.rows if self.whole is None else self.whole.rows
        return DeadlineExceeded(
            f"run {self.name} on {rows} rows",
            expected=f"an answer within {self.timeout} s",
            got="none by then",
            fix="Allow more time, or send less at once.",
        )


def _options() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    # ONNX Runtime would print an error for every run that is stopped on purpose; it raises all of them anyway.
    options.log_severity_level = 4
    # A run that is not recorded says so; where nothing is said, ONNX Runtime's Python asks by an exception, which costs
    # more than the run of a small model.
    options.add_run_config_entry(GRAPH_ID, NOT_CAPTURED)
    return options


@dataclass(slots=True)
class Run:
    """The batch on the engine."""

    calls: list[Call]
    options: onnxruntime.RunOptions = field(default_factory=_options)


Answer = tuple[Call, Answered | Exception | None]
"""None for a piece while others of its call are missing."""
_Told = tuple["asyncio.Future[Answered]", Answered | Exception | None]


def answer(answers: Iterable[Answer]) -> None:
    """Hand answers to the callers that still wait, with one wake-up per event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[_Told]] = {}
    for call, result in answers:
        if not call.gone:
            call.gone = True
            # The future itself: a caller that is cancelled before it hears of the answer lets go of its call's.
            loops.setdefault(call.future.get_loop(), []).append((call.future, result))
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_deliver, own)
        except RuntimeError:
            _log.debug("%d answers have no taker: their event loop was closed without ending its tasks", len(own))


def _deliver(answers: Iterable[_Told]) -> None:
    for future, result in answers:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        elif result is not None:
            future.set_result(result)
