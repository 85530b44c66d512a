"""Prometheus metrics.

The series of a task begin with its first request and end when it is unloaded or deleted.  Beyond `max_task_series`
tasks, others are counted under the name "other", so that clients cannot exhaust memory with task names.

The event loop counts in plain numbers, as each request is counted several times; the objects of prometheus_client are
created at scrape time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.telemetry.generation_metrics import (
    AdapterFigures,
    GenerationSeries,
    of_adapters,
    of_sequences,
    of_series,
)
from tpeft_deploy.runtime.server.telemetry.histograms import Bins, histogram
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.tenancy.shared_meter import LeaseFigures

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_OTHER = ("", "other")
_TIERS = ("disk", "host", "device", "folded")


class _Task:
    """Counters of one task and tenant."""

    __slots__ = ("failed", "generation", "rows", "seconds")

    def __init__(self) -> None:
        self.rows = 0
        self.failed = 0
        self.seconds = Bins(_SECONDS)
        self.generation: GenerationSeries | None = None


class Metrics(Collector):
    """Metrics of the server; all methods except `render` run on the event loop.

    Args:
        max_task_series: maximum number of tasks with separate series.
        residency: returns runtime key of the task -> tier.
        usage: returns the bytes and rows that adapters occupy.
        waiting: returns the number of queued rows.
        dropped: returns the number of dropped log lines.
        generation: returns the figures of the decoder.
        pins: returns the pinned tasks by runtime key.
        ranks: returns the ranks of tasks that were read, by runtime key.

    Attributes:
        lease: returns the lease of rates; None if this server shares them with none.
    """

    def __init__(
        self,
        max_task_series: int,
        residency: Callable[[], Mapping[str, str]],
        usage: Callable[[], Mapping[str, int]],
        waiting: Callable[[], int],
        dropped: Callable[[], int] = lambda: 0,
        generation: Callable[[], GenerationStats | None] = lambda: None,
        pins: Callable[[], Collection[str]] = tuple,
        ranks: Callable[[Iterable[str]], Mapping[str, int]] = lambda _: {},
    ) -> None:
        self._max = max_task_series
        self._residency, self._usage, self._waiting, self._dropped = residency, usage, waiting, dropped
        self._generation, self._pins, self._ranks = generation, pins, ranks
        self.lease: Callable[[], LeaseFigures | None] = lambda: None
        self._requests: dict[tuple[str, str, int], int] = {}  # by protocol, route and status
        self._tasks: dict[tuple[str, str], _Task] = {}  # by tenant and task
        self._queue, self._run, self._batch = Bins(_SECONDS), Bins(_SECONDS), Bins(_ROWS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def request(self, context: RequestContext) -> None:
        """Count a finished request."""
        key = (context.protocol, context.route, context.status)
        self._requests[key] = self._requests.get(key, 0) + 1

    def inference(self, observed: InferenceEvent) -> None:
        """Count an inference and its times."""
        own = self._tasks.get((observed.tenant, observed.task)) or self._new(observed.tenant, observed.task)
        if observed.generation is not None:
            own.generation = own.generation or GenerationSeries()
            own.generation.observe(observed.generation)
        if observed.failed:
            own.failed += 1
            return
        timing = observed.timing
        own.rows += observed.rows
        own.seconds.observe(observed.seconds)
        self._queue.observe(timing.queued)
        self._run.observe(timing.ran)
        self._batch.observe(timing.rows)

    def drop(self, tenant: str, task: str) -> None:
        """Remove the series of a task; those of a shared task for all tenants."""
        for key in [key for key in self._tasks if key[1] == task and tenant in {"", key[0]}]:
            del self._tasks[key]

    def render(self) -> bytes:
        """Render the Prometheus text format; slow with many tasks, so it must not run on the event loop."""
        return generate_latest(self._registry)

    def listen(self, host: str, port: int) -> WSGIServer:
        """Answer each request to a port with the metrics, in threads and without a key; returns the server.

        Raises:
            ServerError: something else listens there.
        """
        try:
            server, _ = start_http_server(port, host, self._registry)
        except OSError as error:
            doing = f"listen on {host}:{port} for metrics"
            fix = "Set another metrics_port, or stop what listens there."
            raise ServerError(doing, problem=error.strerror or str(error), fix=fix) from None
        return server

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics to prometheus_client."""
        requests = CounterMetricFamily("tpeft_requests", "Requests answered", labels=("protocol", "route", "code"))
        for (protocol, route, status), count in self._requests.copy().items():
            requests.add_metric((protocol, route, str(status)), count)
        yield requests
        yield from self._of_tasks(self._tasks.copy())
        yield histogram("tpeft_queue_seconds", "Waiting for a run", [((), self._queue)])
        yield histogram("tpeft_run_seconds", "Time of the run of a request", [((), self._run)])
        yield histogram("tpeft_batch_rows", "Rows of the run of a request", [((), self._batch)])
        yield CounterMetricFamily("tpeft_log_lines_dropped", "Log lines dropped", value=self._dropped())
        yield from _of_lease(self.lease(), self._max)
        yield from self._of_runtime()

    def _new(self, tenant: str, task: str) -> _Task:
        key = (tenant, task) if len(self._tasks) < self._max else _OTHER
        return self._tasks.setdefault(key, _Task())

    def _of_tasks(self, tasks: Mapping[tuple[str, str], _Task]) -> Iterator[Metric]:
        labels = ("tenant", "task")
        rows = CounterMetricFamily("tpeft_rows", "Rows answered", labels=labels)
        failed = CounterMetricFamily("tpeft_failures", "Inferences without an answer", labels=labels)
        for key, own in tasks.items():
            rows.add_metric(key, own.rows)
            failed.add_metric(key, own.failed)
        yield rows
        yield failed
        seconds = [(key, own.seconds) for key, own in tasks.items()]
        yield histogram("tpeft_inference_seconds", "From a request to its answer", seconds, labels)
        yield from of_series({key: own.generation for key, own in tasks.items() if own.generation is not None})

    def _of_runtime(self) -> Iterator[Metric]:
        residency = self._residency()
        counts = Counter(residency.values())
        tiers = GaugeMetricFamily("tpeft_adapters", "Adapters by where they are", labels=("tier",))
        for tier in _TIERS:
            tiers.add_metric((tier,), counts[tier])
        yield tiers
        usage = GaugeMetricFamily("tpeft_adapter_bytes", "What adapters take", labels=("where",))
        taken = self._usage()
        for where, value in taken.items():
            usage.add_metric((where,), value)
        yield usage
        yield GaugeMetricFamily("tpeft_queue_rows", "Rows that wait", value=self._waiting())
        lists = {tier: sorted(task for task, own in residency.items() if own == tier) for tier in counts}
        about = "Adapters by tier as comma lists; the value is the time"
        residents = GaugeMetricFamily("tpeft_resident_adapters_info", about, labels=("device", "host", "folded"))
        shown = [",".join(lists.get(tier, [])[: self._max]) for tier in ("device", "host", "folded")]
        residents.add_metric(shown, time.time())
        yield residents
        stats = self._generation()
        yield from of_sequences(stats)
        adapters = AdapterFigures(residency, max(0, taken.get("rows", 1) - 1), self._pins(), self._ranks)
        yield from of_adapters(stats, adapters, self._max)


def _of_lease(lease: LeaseFigures | None, most: int) -> Iterator[Metric]:
    """Yield the shares of rates, of `most` at most, and the age of their lease; without samples if there is none."""
    labels = ("tenant", "rate")
    shares = GaugeMetricFamily("tpeft_rate_share", "Share of a tenant's rate on this server, 0 to 1", labels=labels)
    age = GaugeMetricFamily("tpeft_lease_age_seconds", "Since the last renewal of the shares")
    servers = GaugeMetricFamily("tpeft_lease_servers", "Servers that share rates")
    if lease is not None:
        for (what, tenant), share in list(lease.shares.items())[:most]:
            shares.add_metric((tenant, what), share)
        age.add_metric((), lease.age)
        servers.add_metric((), lease.servers)
    yield from (shares, age, servers)
