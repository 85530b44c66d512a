"""What one inference took, and who is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.server.operations.targets import Target

__all__ = ["Observed", "Observers"]

_MOST = 256
_SECONDS = 0.1


class Observed(msgspec.Struct, frozen=True):
    """What one inference took, for statistics, metrics and spans.

    Attributes:
        tenant: who asked.
        task: what was asked for, by name; the bundle's where rows had tasks of their own.
        targets: what it ran on: one for all rows, or one a row.
        rows: of the request.
        timing: when it waited and ran.
        seconds: from its arrival to its answer.
        failed: whether it has no answer.
        traceparent: the caller's W3C trace context; empty: none.
    """

    tenant: str
    task: str
    targets: Sequence[Target]
    rows: int
    timing: Timing
    seconds: float
    failed: bool
    traceparent: str = ""


class Observers:
    """Tells those who count what was answered, many at a time and soon; belongs to the event loop.

    A request would wait for it otherwise; and what is done many times in a row costs less than the same done once for
    each request, with all else that a request needs in between.

    Args:
        hear: told of each inference, in order; must not block.
    """

    def __init__(self, *hear: Callable[[Observed], None]) -> None:
        self._hear = hear
        self._waiting: list[Observed] = []
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, observed: Observed) -> None:
        """An inference is over."""
        self._waiting.append(observed)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._due)
        elif len(self._waiting) >= _MOST:
            self.settle()

    def settle(self) -> None:
        """Let everybody know by now: to be called before what was counted is asked for, or forgotten."""
        waiting, self._waiting = self._waiting, []
        for hear in self._hear:
            for observed in waiting:
                hear(observed)

    def _due(self) -> None:
        self._timer = None
        self.settle()
