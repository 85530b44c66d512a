"""OpenTelemetry spans if a tracer provider is configured: `infer TASK` with the children `queue` and `run`.

Spans are created after an inference has finished, from recorded times, so that requests do not wait for them.
"""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent

__all__ = ["Tracing", "tracing"]

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Observer that creates spans.

    Args:
        tracer: OpenTelemetry tracer; must not block (batching span processors do not).
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def inference(self, observed: InferenceEvent) -> None:
        """Create the spans of a finished inference as children of the caller's span."""
        parent: Context = _PROPAGATOR.extract({"traceparent": observed.traceparent}, context=Context())
        timing = observed.timing
        offset = time.time() - time.monotonic()

        def at(monotonic: float) -> int:
            return int((monotonic + offset) * 1e9)

        over = timing.arrived + observed.seconds
        span = self._tracer.start_span(
            f"infer {observed.task[:128]}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=at(timing.arrived),
            attributes={
                "tpeft.tenant": observed.tenant,
                "tpeft.task": observed.task[:128],
                "tpeft.rows": observed.rows,
            },
        )
        if observed.failed:
            span.set_status(Status(StatusCode.ERROR))
        if timing.began:
            own = trace.set_span_in_context(span, Context())
            queue = self._tracer.start_span("queue", context=own, start_time=at(timing.arrived))
            queue.end(at(timing.began))
            attributes = {"tpeft.batch_rows": timing.rows}
            run = self._tracer.start_span("run", context=own, start_time=at(timing.began), attributes=attributes)
            run.end(at(timing.ended or over))
        span.end(at(over))


def tracing() -> Tracing | None:
    """Return a `Tracing` for the process's tracer provider; None without one, to avoid the overhead."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return Tracing(trace.get_tracer("tpeft_deploy"))
