"""Counters and times for Prometheus.

A task's series begin with its first request and go when it is unloaded or deleted; beyond `max_task_series` tasks,
others are counted under the name "other", so that nobody can fill the server's memory with names.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tpeft_deploy.runtime.server.exchange import Exchange
from tpeft_deploy.runtime.server.inference import Observed

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_OTHER = ("", "other")


class Metrics:
    """The server's metrics, in a registry of their own.

    Args:
        max_task_series: tasks with series of their own.
        residency: task as the runtime names it -> tier.
        usage: bytes and rows that adapters take.
        waiting: rows that wait.
    """

    def __init__(
        self,
        max_task_series: int,
        residency: Callable[[], Mapping[str, str]],
        usage: Callable[[], Mapping[str, int]],
        waiting: Callable[[], int],
    ) -> None:
        self._registry = own = CollectorRegistry()
        self._max = max_task_series
        self._residency, self._usage, self._waiting = residency, usage, waiting
        self._known: dict[tuple[str, str], tuple[Any, Any, Any]] = {}
        self._answers: dict[tuple[str, str, int], Any] = {}
        labels = ("tenant", "task")
        self._requests = Counter("tpeft_requests", "Requests answered", ("protocol", "route", "code"), registry=own)
        self._rows = Counter("tpeft_rows", "Rows answered", labels, registry=own)
        self._failed = Counter("tpeft_failures", "Inferences without an answer", labels, registry=own)
        self._seconds = Histogram(
            "tpeft_inference_seconds", "From a request to its answer", labels, buckets=_SECONDS, registry=own
        )
        self._queue = Histogram("tpeft_queue_seconds", "Waiting for a run", buckets=_SECONDS, registry=own)
        self._run = Histogram("tpeft_run_seconds", "Time of the run of a request", buckets=_SECONDS, registry=own)
        self._batch = Histogram("tpeft_batch_rows", "Rows of the run of a request", buckets=_ROWS, registry=own)
        self._tiers = Gauge("tpeft_adapters", "Adapters by where they are", ("tier",), registry=own)
        self._bytes = Gauge("tpeft_adapter_bytes", "What adapters take", ("where",), registry=own)
        self._depth = Gauge("tpeft_queue_rows", "Rows that wait", registry=own)
        self._residents = Gauge(
            "tpeft_resident_adapters_info",
            "Adapters by tier as comma lists; the value is the time",
            ("device", "host", "folded"),
            registry=own,
        )

    def request(self, exchange: Exchange) -> None:
        """Count a request that was answered."""
        key = (exchange.protocol, exchange.route, exchange.status)
        child = self._answers.get(key)
        if child is None:
            child = self._answers[key] = self._requests.labels(exchange.protocol, exchange.route, str(exchange.status))
        child.inc()

    def inference(self, observed: Observed) -> None:
        """Count an inference and its times."""
        rows, failed, seconds = self._of(observed.tenant, observed.task)
        if observed.failed:
            failed.inc()
            return
        rows.inc(observed.rows)
        seconds.observe(time.monotonic() - observed.timing.arrived)
        self._queue.observe(observed.timing.queued)
        self._run.observe(observed.timing.ran)
        self._batch.observe(observed.timing.rows)

    def drop(self, tenant: str, task: str) -> None:
        """Forget a task's series; of a shared task, every tenant's."""
        for key in [key for key in self._known if key[1] == task and tenant in {"", key[0]}]:
            del self._known[key]
            for metric in (self._rows, self._failed, self._seconds):
                metric.remove(*key)

    def render(self) -> bytes:
        """All of them in Prometheus' text format; takes long with many tasks, so not on the event loop."""
        residency = self._residency()
        counts = Counts(residency.values())
        for tier in ("disk", "host", "device", "folded"):
            self._tiers.labels(tier).set(counts[tier])
        for where, value in self._usage().items():
            self._bytes.labels(where).set(value)
        self._depth.set(self._waiting())
        lists = {tier: sorted(task for task, own in residency.items() if own == tier) for tier in counts}
        shown = [",".join(lists.get(tier, [])[: self._max]) for tier in ("device", "host", "folded")]
        self._residents.clear()
        self._residents.labels(*shown).set(time.time())
        return generate_latest(self._registry)

    def _of(self, tenant: str, task: str) -> tuple[Any, Any, Any]:
        key = (tenant, task)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._max and key != _OTHER:
                return self._of(*_OTHER)
            found = self._rows.labels(*key), self._failed.labels(*key), self._seconds.labels(*key)
            self._known[key] = found
        return found
