"""What a batcher has done: numbers for whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Figures"]


@dataclass(frozen=True)
class Figures:
    """What a batcher has done so far, and what waits.

    Attributes:
        waiting_requests: requests in the queue.
        waiting_rows: their rows.
        batches: runs of the engine; a batch that failed and was run again request by request counts those too.
        rows: rows in those runs.
        joined: number of requests in a run -> number of such runs.
        refused: requests that the queue, or its order, did not take.
        overdue: requests whose deadline came first.
        cancelled: requests given up by their callers.
        stopped: runs that were told to stop because nobody waited any more.
    """

    waiting_requests: int
    waiting_rows: int
    batches: int
    rows: int
    joined: Mapping[int, int]
    refused: int
    overdue: int
    cancelled: int
    stopped: int
