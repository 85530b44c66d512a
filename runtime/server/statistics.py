"""What each task has answered so far, for the statistics extension.  All of it belongs to the event loop."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from tpeft_deploy.runtime.server.core import Document

__all__ = ["Statistics", "Tally"]


@dataclass
class Tally:
    """Counts and nanoseconds of one version of a task."""

    inferences: int = 0
    executions: Counter[int] = field(default_factory=Counter)
    last: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    nanoseconds: Counter[str] = field(default_factory=Counter)
    batch_nanoseconds: Counter[int] = field(default_factory=Counter)

    def succeeded(self, rows: int, *, total: float, queue: float, run: float, batch: int) -> None:
        """A request was answered.

        Args:
            rows: its own.
            total: seconds from its arrival to its answer.
            queue: of them, waiting.
            run: of them, in the run that answered it.
            batch: rows of that run.
        """
        self.inferences += rows
        self.executions[batch] += 1
        self.batch_nanoseconds[batch] += _ns(run)
        self.last = time.time()
        for what, seconds in (("success", total), ("queue", queue), ("compute_infer", run)):
            self.counts[what] += 1
            self.nanoseconds[what] += _ns(seconds)

    def failed(self, total: float) -> None:
        """A request was not answered, after so many seconds."""
        self.counts["fail"] += 1
        self.nanoseconds["fail"] += _ns(total)

    def document(self, name: str, version: str) -> Document:
        """In the fields of the protocol; a request that shared a run counts that run as its own."""
        kinds = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit")
        return {
            "name": name,
            "version": version,
            "last_inference": round(1000 * self.last),
            "inference_count": self.inferences,
            "execution_count": self.executions.total(),
            "inference_stats": {
                kind: {"count": self.counts[kind], "ns": self.nanoseconds[kind]} for kind in (*kinds, "cache_miss")
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": {"count": count, "ns": 0},
                    "compute_infer": {"count": count, "ns": self.batch_nanoseconds[size]},
                    "compute_output": {"count": count, "ns": 0},
                }
                for size, count in sorted(self.executions.items())
            ],
            "memory_usage": [],
        }


class Statistics:
    """Tallies by tenant, task and version; forgotten when a task is unloaded or deleted."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str, str], Tally] = {}

    def tally(self, tenant: str, task: str, version: str) -> Tally:
        """The tally of a version, from zero when it is new."""
        key = (tenant, task, version)
        found = self._tallies.get(key)
        if found is None:
            found = self._tallies[key] = Tally()
        return found

    def drop(self, tenant: str, task: str) -> None:
        """Forget a task's."""
        for key in [key for key in self._tallies if key[:2] == (tenant, task)]:
            del self._tallies[key]

    def document(self, tenant: str, task: str, version: str) -> Document:
        """What the protocol says about a version; zeros when it has answered nothing."""
        return self._tallies.get((tenant, task, version), Tally()).document(task, version)


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
