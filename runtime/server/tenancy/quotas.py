"""Quotas of tenants, and their shares of the queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from tpeft_deploy.errors import ProtocolError, QuotaExceeded, TooLarge

__all__ = ["Quota", "Quotas", "queue_shares"]


@dataclass(frozen=True)
class Quota:
    """Quotas and weight of a tenant; None means no limit.

    Attributes:
        requests_per_s: inference requests per second, with bursts of one second's worth, at least 1.
        rows_per_s: rows per second, likewise; a request larger than a burst is admitted when the bucket is full.
        queue_share: share of the rows that may wait for the runtime, 0 to 1.
        adapters: maximum number of registered versions.
        bytes: maximum size of all registered adapters.
        weight: weight in weighted fair queueing: twice the weight gets twice the computation while both tenants wait.
        pins: maximum number of pinned versions.
        folded: maximum number of pinned versions with a folded session.
        tokens_per_min: tokens of prompts and generated tokens per minute, with bursts of one minute's worth; a request
            spends as many as it may generate, and gets back what it has not.

    Raises:
        ProtocolError: a limit is invalid.
    """

    requests_per_s: float | None = None
    rows_per_s: float | None = None
    queue_share: float | None = None
    adapters: int | None = None
    bytes: int | None = None
    weight: float = 1.0
    pins: int | None = None
    folded: int | None = None
    tokens_per_min: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in {"adapters", "bytes", "pins", "folded"} else math.ulp(0.0)
            most = 1 if field.name == "queue_share" else math.inf
            fine = (value is None and field.name != "weight") or (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
                and least <= value <= most
            )
            if not fine:
                above = "from 0" if least == 0 else "above 0"
                raise ProtocolError(
                    f"set quota {field.name!r}",
                    expected=f"a number {above}{' to 1' if most == 1 else ''}, or none",
                    got=repr(value),
                )


class Quotas:
    """Current quota of each tenant.

    Args:
        default: quota of tenants without one.

    Attributes:
        known: tenant -> quota; replaced as a whole when a quota is set.
    """

    def __init__(self, default: Quota) -> None:
        self.default = default
        self.known: Mapping[str, Quota] = {}

    def __call__(self, tenant: str) -> Quota:
        """Return a tenant's quota; the default for an unknown tenant."""
        return self.known.get(tenant, self.default)

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight in weighted fair queueing."""
        return self(tenant).weight


def queue_shares(quota: Callable[[str], Quota], max_queue_rows: int) -> Callable[[str, int, int], None]:
    """Return the admission control that keeps each tenant within its share of the queue; see `Fair`.

    Args:
        quota: returns the current quota of a tenant.
        max_queue_rows: maximum rows of the whole queue.

    Returns:
        A function of tenant, its waiting rows and the rows of the request, which raises TooLarge for a request larger
        than the share, and QuotaExceeded for one that may be retried later.
    """

    def admit(tenant: str, waiting: int, rows: int) -> None:
        share = quota(tenant).queue_share
        if share is None:
            return
        most = max(1.0, share * max_queue_rows)
        if waiting + rows <= most:
            return
        doing = f"queue a request of tenant {tenant!r}"
        if rows > most:
            raise TooLarge(
                doing,
                expected=f"at most {most:g} rows, the tenant's share of the queue",
                got=f"what counts as {rows} rows",
                fix="Send fewer rows at once.",
            )
        raise QuotaExceeded(
            doing,
            expected=f"at most {most:g} rows of it waiting",
            got=f"{waiting} waiting and {rows} more",
            fix="Send less at once, or later.",
            retry_after=1.0,
        )

    return admit
