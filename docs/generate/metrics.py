"""The page of the server's metrics."""

from __future__ import annotations

from docs.generate.markdown import code, generated, table
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics

__all__ = ["page"]

_TEXT = """
Served at `/metrics` in Prometheus' text format. A counter's series end in `_total`; a histogram has the series `_bucket`
(with the label `le`), `_sum` and `_count`. [Running the server](../server.md#metrics) says who may read them, and has more
on single metrics; `deploy/kubernetes/monitoring/` has alerts and a dashboard.

"""


def page() -> str:
    """Return docs/reference/metrics.md."""
    metrics = Metrics(1, dict, dict, lambda: 0)
    rows = []
    for family in metrics.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(code(label) for label in getattr(family, "_labelnames", ()))
        rows.append((code(name), family.type, labels, family.documentation))
    return generated(
        "Metrics of the server",
        "runtime/server/telemetry/",
        _TEXT + table(("name", "type", "labels", "description"), rows),
    )
