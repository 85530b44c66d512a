"""Requests of callers in a batcher, and the way back to their event loops."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnxruntime

from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import DeadlineExceeded
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.batching.policy import Request
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.sessions.providers import GRAPH_ID, NOT_CAPTURED
from tpeft_deploy.tucker import Array

if TYPE_CHECKING:
    from tpeft_deploy.runtime.batching.pieces import Whole

__all__ = ["CallResult", "Answered", "Call", "InferOptions", "Run", "answer"]

_log = logging.getLogger("tpeft_deploy.runtime")

Answered = dict[str, Array | list[Array]]


@dataclass(slots=True)
class InferOptions:
    """Options of a request.

    Attributes:
        outputs: outputs to answer; one that depends on the batch as a whole keeps the request apart from others.
        apart: whether there is a version for each row; outputs with a size per task are then lists with one
            array a row.
        timeout: seconds, from now, until the answer is of no use; by default it always is.
        tenant: tenant that the order of the queue charges.
        priority: priority among the tenant's requests on the same task, the smaller first.
        timing: receives the begin and end of the request's run.
        deadline: end of the timeout, by `time.monotonic`.
    """

    outputs: Sequence[Port]
    apart: bool = False
    timeout: float | None = None
    tenant: str = ""
    priority: int = 0
    timing: Timing | None = None
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(eq=False, slots=True)
class Call:
    """One request of one caller, or a piece of it; `gone` once the caller does not wait any more, or has its answer."""

    request: Request[Form]
    inputs: Mapping[str, Array]
    held: Held  # acquired for all rows, also by a piece
    versions: Sequence[Version]  # one for all rows, or, with `options.apart`, one a row
    options: InferOptions
    future: asyncio.Future[Answered]
    gone: bool = False
    whole: Whole | None = None  # of a piece
    start: int = 0  # its first row in that

    @property
    def together(self) -> Sequence[Call]:
        """All pieces of the caller's request; itself where it is not cut."""
        return (self,) if self.whole is None else self.whole.pieces

    def release(self) -> None:
        """Break reference cycles, so that inputs are freed without waiting for a collection.

        A future holds its exception, the exception its frames, and the frames this call.
        """
        if self.whole is None:
            del self.future
            return
        for piece in self.whole.pieces:
            del piece.future
        self.whole.release()

    @property
    def name(self) -> str:
        """Name of the tasks, for messages."""
        first, count = f"task {self.versions[0]!r}", len(set(self.versions))
        return first if count == 1 else f"{count} tasks, {first} first,"

    @property
    def per_row(self) -> Sequence[Version]:
        """Version of each row."""
        return self.versions if self.options.apart else self.request.rows * list(self.versions)

    def overdue(self) -> DeadlineExceeded:
        """Return the error for a call past its deadline."""
        rows = self.request.rows if self.whole is None else self.whole.rows
        return DeadlineExceeded(
            f"run {self.name} on {rows} rows",
            expected=f"an answer within {self.options.timeout} s",
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
    """The batch on the engine.

    Attributes:
        calls: requests in the batch.
        options: options of the run; setting `terminate` stops it.
        held: versions of the calls.
        left: those of callers that left during the run, to be released at the end of it.
    """

    calls: list[Call]
    options: onnxruntime.RunOptions = field(default_factory=_options)
    held: set[Held] = field(init=False)
    left: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held = {call.held for call in self.calls}


CallResult = tuple[Call, Answered | Exception | None]
"""None for a piece while others of its call are missing."""
_Told = tuple["asyncio.Future[Answered]", Answered | Exception | None]


def answer(answers: Iterable[CallResult]) -> None:
    """Hand answers to the callers that still wait, with one wake-up per event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[_Told]] = {}
    for call, result in answers:
        if not call.gone:
            call.gone = True
            # The future itself: a caller that is cancelled before it hears of the answer deletes the call's.
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
