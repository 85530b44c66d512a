"""Configuration of the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.server.isolation.pool import Reader
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.registry import State
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair, Orders
from tpeft_deploy.runtime.server.tenancy.quotas import queue_shares

__all__ = ["Options", "order_of"]


@dataclass(frozen=True)
class Options:
    """Configuration of `Service`.

    Attributes:
        limits: limits of batching.
        authenticate: whether requests need a key.
        max_upload_bytes: maximum size of one upload.
        reader: reads the files of uploads (default: in this process, without limits).
        max_folded: maximum number of pinned versions with a folded session, over all tenants.
        metrics: renders the metrics; blocks.
        metrics_for_all: whether any key may read the metrics.
        changes_per_s: maximum changes per second of one key.
        audit_days: retention of audit entries in days.
        audit_rows: maximum number of retained audit entries.
        observe: receives each inference event, on the event loop, shortly after the inference.
        forget: receives tenant and name of each deleted task.
        pools: threads for blocking work.
    """

    limits: Limits = field(default_factory=Limits)
    authenticate: bool = True
    max_upload_bytes: int = 2**30
    reader: Reader | None = None
    max_folded: int = 8
    metrics: Callable[[], bytes] = lambda: b""
    metrics_for_all: bool = False
    changes_per_s: float | None = None
    audit_days: float | None = None
    audit_rows: int | None = None
    observe: Callable[[InferenceEvent], None] = lambda _: None
    forget: Callable[[str, str], None] = lambda _tenant, _task: None
    pools: Pools = field(default_factory=Pools)


def order_of(state: State, limits: Limits) -> Orders:
    """Create the orders of queues: weighted fair queueing over tenants, each limited to its share."""
    quota = state.tenants.quota
    return Orders(lambda: Fair(quota.weight, queue_shares(quota, limits.max_queue_rows)))
