"""Counts and durations by model for the statistics extension; not thread-safe, used on the event loop only."""

from __future__ import annotations

import time

from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.v2.messages import Document, ServedVersion

__all__ = ["Statistics", "Tally"]


class Tally:
    """Counts and durations of one version of a task."""

    __slots__ = ("answered", "batches", "failed", "failing", "inferences", "last", "queued", "ran", "took")

    def __init__(self) -> None:
        self.inferences = 0  # rows
        self.answered = 0
        self.took = 0.0
        self.queued = 0.0
        self.ran = 0.0
        self.failed = 0
        self.failing = 0.0
        self.last = 0.0
        self.batches: dict[int, tuple[int, float]] = {}  # batch size -> number of runs, and their seconds

    def succeeded(self, rows: int, *, total: float, queue: float, run: float, batch: int) -> None:
        """Count a successful request.

        Args:
            rows: number of rows in the request.
            total: seconds from arrival to response.
            queue: seconds in the queue.
            run: seconds of the run.
            batch: number of rows in the run.
        """
        self.inferences += rows
        self.answered += 1
        self.took += total
        self.queued += queue
        self.ran += run
        self.last = time.time()
        count, seconds = self.batches.get(batch, (0, 0.0))
        self.batches[batch] = (count + 1, seconds + run)

    def failing_after(self, total: float) -> None:
        """Count a request that failed after `total` seconds."""
        self.failed += 1
        self.failing += total

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name in ("inferences", "answered", "took", "queued", "ran", "failed", "failing"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last = max(self.last, other.last)
        for size, (count, seconds) in other.batches.items():
            own, before = self.batches.get(size, (0, 0.0))
            self.batches[size] = (own + count, before + seconds)

    def document(self, name: str, version: str) -> Document:
        """Return the statistics document of the protocol; each request of a shared run counts the whole run."""
        nothing = {"count": 0, "ns": 0}
        return {
            "name": name,
            "version": version,
            "last_inference": round(1000 * self.last),
            "inference_count": self.inferences,
            "execution_count": self.answered,
            "inference_stats": {
                "success": {"count": self.answered, "ns": _ns(self.took)},
                "fail": {"count": self.failed, "ns": _ns(self.failing)},
                "queue": {"count": self.answered, "ns": _ns(self.queued)},
                "compute_input": nothing,
                "compute_infer": {"count": self.answered, "ns": _ns(self.ran)},
                "compute_output": nothing,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": {"count": count, "ns": 0},
                    "compute_infer": {"count": count, "ns": _ns(seconds)},
                    "compute_output": {"count": count, "ns": 0},
                }
                for size, (count, seconds) in sorted(self.batches.items())
            ],
            "memory_usage": [],
        }


class Statistics:
    """Tallies by model, version and calling tenant; dropped when a task is unloaded or deleted.

    A model is a task, or TASK/COMPONENT where the bundle has several components.
    """

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str, str], dict[str, Tally]] = {}

    def inference(self, observed: InferenceEvent) -> None:
        """Count an inference for each version that it ran on."""
        targets, timing = observed.targets, observed.timing
        for target in set(targets) if len(targets) > 1 else targets:
            tally = self._tally(target, observed)
            if observed.failed:
                tally.failing_after(observed.seconds)
                continue
            own = observed.rows if len(targets) == 1 else targets.count(target)
            tally.succeeded(own, total=observed.seconds, queue=timing.queued, run=timing.ran, batch=timing.rows)

    def drop(self, tenant: str, task: str) -> None:
        """Drop the tallies of a task."""
        for key in [key for key in self._tallies if (key[0], key[1].partition("/")[0]) == (tenant, task)]:
            del self._tallies[key]

    def document(self, tenant: str, model: str, version: str, asked_by: str | None = None) -> Document:
        """Return the statistics document of a version; all zeros before its first request.

        Args:
            tenant: owner of the task.
            model: name of the model.
            version: version number.
            asked_by: count the requests of this tenant only; None counts all.
        """
        found = self._tallies.get((tenant, model, version), {})
        if asked_by is not None:
            return found.get(asked_by, Tally()).document(model, version)
        whole = Tally()
        for tally in found.values():
            whole.add(tally)
        return whole.document(model, version)

    def _tally(self, target: ServedVersion, observed: InferenceEvent) -> Tally:
        model = f"{target.task}/{observed.component}" if observed.component else target.task
        own = self._tallies.setdefault((target.tenant, model, target.version), {})
        found = own.get(observed.tenant)
        if found is None:
            found = own[observed.tenant] = Tally()
        return found


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
