"""Counters of a batcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

__all__ = ["BatchingStats"]


@dataclass(frozen=True)
class BatchingStats:
    """Counters of the runs so far, and the present queue.

    Attributes:
        waiting_requests: requests in the queue.
        waiting_rows: their rows.
        batches: runs of the engine; a batch that failed and was run again request by request counts those too.
        rows: rows in those runs.
        joined: number of requests in a run -> number of such runs.
        refused: requests that the queue, or its order, did not take.
        overdue: requests that passed their deadline.
        cancelled: requests given up by their callers.
        stopped: runs that were told to stop because no caller waited any more.
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

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Return the sums of several batchers' counters."""
        if len(parts) == 1:
            return parts[0]
        joined: Counter[int] = Counter()
        for part in parts:
            joined.update(part.joined)
        counts = {
            own.name: sum(getattr(part, own.name) for part in parts) for own in fields(cls) if own.name != "joined"
        }
        return cls(joined=dict(joined), **counts)
