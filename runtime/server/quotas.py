"""What tenants are allowed, and the meter that says when it is used up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from tpeft_deploy.errors import ProtocolError, QuotaExceeded

__all__ = ["Meter", "Quota"]

_KEPT = 4096  # tenants whose buckets are remembered before full ones are forgotten


@dataclass(frozen=True)
class Quota:
    """What a tenant is allowed; None is no limit.

    Attributes:
        requests_per_s: inference requests a second; a burst of one second's worth, at least 1, may come at once.
        rows_per_s: rows a second, likewise; a request of more rows than a burst is let through when the bucket is full.
        queue_share: of the rows that may wait for the runtime, 0 to 1.
        adapters: registered versions.
        bytes: of registered adapters.
        weight: of the tenant in the queue: twice the weight gets twice the computation while both wait.

    Raises:
        ProtocolError: a limit that makes no sense.
    """

    requests_per_s: float | None = None
    rows_per_s: float | None = None
    queue_share: float | None = None
    adapters: int | None = None
    bytes: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in {"adapters", "bytes"} else math.ulp(0.0)
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


@dataclass(slots=True)
class _Bucket:
    """Tokens that come at a rate, as many as one second brings at most."""

    tokens: float
    at: float

    def fill(self, rate: float, now: float) -> None:
        self.tokens = min(max(rate, 1.0), self.tokens + rate * (now - self.at))
        self.at = now


class Meter:
    """Token buckets of requests and rows, per tenant.  Belongs to one thread: the event loop's.

    Args:
        quota: a tenant's quota now.
    """

    def __init__(self, quota: Callable[[str], Quota]) -> None:
        self._quota = quota
        self._requests: dict[str, _Bucket] = {}
        self._rows: dict[str, _Bucket] = {}

    def spend(self, tenant: str, rows: int, now: float) -> None:
        """Take a request of so many rows from a tenant's quota, or nothing at all.

        Args:
            tenant: whose.
            rows: of the request.
            now: seconds of any clock that does not run backwards.

        Raises:
            QuotaExceeded: with the seconds after which the same request is allowed.
        """
        quota = self._quota(tenant)
        if quota.requests_per_s is None and quota.rows_per_s is None:
            return
        requests = self._bucket(self._requests, tenant, quota.requests_per_s, now)
        own = self._bucket(self._rows, tenant, quota.rows_per_s, now)
        if requests is not None and requests.tokens < 1:
            raise _exceeded(tenant, "requests", quota.requests_per_s, 1 - requests.tokens)
        if own is not None:
            # What is larger than the bucket waits for a full one and leaves a debt.
            needed = min(rows, max(1.0, quota.rows_per_s or 1.0))
            if own.tokens < needed:
                raise _exceeded(tenant, "rows", quota.rows_per_s, needed - own.tokens)
            own.tokens -= rows
        if requests is not None:
            requests.tokens -= 1

    def check_share(self, tenant: str, waiting: int, rows: int, most: float) -> None:
        """Refuse a request that would let a tenant take more of the queue than its share; an empty share takes any.

        Args:
            tenant: whose.
            waiting: rows of it that wait.
            rows: of the request.
            most: rows of it that may wait.

        Raises:
            QuotaExceeded: to be tried again once some have been served.
        """
        if waiting and waiting + rows > most:
            raise QuotaExceeded(
                f"queue a request of tenant {tenant!r}",
                expected=f"at most {most:g} rows of it waiting",
                got=f"{waiting} waiting and {rows} more",
                fix="Send less at once, or later.",
                retry_after=1.0,
            )

    def _bucket(self, buckets: dict[str, _Bucket], tenant: str, rate: float | None, now: float) -> _Bucket | None:
        if rate is None:
            buckets.pop(tenant, None)
            return None
        bucket = buckets.get(tenant)
        if bucket is None:
            if len(buckets) >= _KEPT:
                self._forget(buckets, now)
            bucket = buckets[tenant] = _Bucket(max(rate, 1.0), now)
        else:
            bucket.fill(rate, now)
        return bucket

    def _forget(self, buckets: dict[str, _Bucket], now: float) -> None:
        # A bucket that nobody took from for a minute is as good as new, unless a huge request left it in debt.
        for tenant in [tenant for tenant, own in buckets.items() if now - own.at > 60 and own.tokens >= 0]:
            del buckets[tenant]


def _exceeded(tenant: str, what: str, rate: float | None, missing: float) -> QuotaExceeded:
    wait = missing / rate if rate else 1.0
    return QuotaExceeded(
        f"run a request of tenant {tenant!r}",
        expected=f"at most {rate:g} {what} a second",
        got="more",
        fix=f"Send it again in {wait:.3g} s.",
        retry_after=wait,
    )
