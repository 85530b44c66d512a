"""Spans beneath the caller's, through OpenTelemetry's own SDK."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.telemetry.tracing import Tracing, tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


def spans(observed: InferenceEvent) -> dict[str, object]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracing(provider.get_tracer("a test")).inference(observed)
    return {span.name: span for span in exporter.get_finished_spans()}


def test_an_inference_lies_beneath_its_caller_with_queue_and_run() -> None:
    timing = Timing(100.0, began=100.5, ended=102.5, rows=7)
    found = spans(InferenceEvent("acme", "mood", [], 3, timing, 0.5, failed=False, traceparent=f"00-{TRACE}-{SPAN}-01"))
    whole, queue, run = (found[name] for name in ("infer mood", "queue", "run"))
    assert f"{whole.context.trace_id:032x}" == TRACE  # type: ignore[attr-defined]
    assert f"{whole.parent.span_id:016x}" == SPAN  # type: ignore[attr-defined]
    for inner in (queue, run):
        assert inner.parent.span_id == whole.context.span_id  # type: ignore[attr-defined]
    assert queue.end_time - queue.start_time == pytest.approx(0.5e9, rel=1e-3)  # type: ignore[attr-defined]
    assert run.end_time - run.start_time == pytest.approx(2e9, rel=1e-3)  # type: ignore[attr-defined]
    assert dict(whole.attributes) == {"tpeft.tenant": "acme", "tpeft.task": "mood", "tpeft.rows": 3}  # type: ignore[attr-defined]
    assert dict(run.attributes) == {"tpeft.batch_rows": 7}  # type: ignore[attr-defined]


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-0-0-00", "é" * 1000])
def test_a_context_that_is_none_begins_a_trace(traceparent: str) -> None:
    found = spans(InferenceEvent("acme", "mood", [], 1, Timing(100.0), 0.5, failed=True, traceparent=traceparent))
    (only,) = found.values()
    assert only.parent is None  # type: ignore[attr-defined]
    assert not only.status.is_ok  # type: ignore[attr-defined]


def test_without_a_provider_nothing_is_made() -> None:
    assert tracing() is None
