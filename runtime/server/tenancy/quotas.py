"""Quotas of tenants, and the meter that enforces rates."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from tpeft_deploy.errors import ProtocolError, QuotaExceeded, TooLarge

__all__ = ["Meter", "Quota", "Quotas", "RequestRate", "queue_shares"]

_KEPT = 64  # tenants kept regardless of their remaining tokens


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


@dataclass(slots=True)
class _Account:
    """Token buckets of a tenant; each holds the tokens of one second, at least 1."""

    quota: Quota
    at: float
    requests: float = math.inf
    rows: float = math.inf
    most_requests: float = math.inf
    most_rows: float = math.inf

    def __post_init__(self) -> None:
        self._bound(self.quota)

    def fill(self, quota: Quota, now: float) -> None:
        if quota is not self.quota:
            self._bound(quota)
        passed = now - self.at
        if passed > 0:
            self.at = now
            self.requests = min(self.most_requests, self.requests + passed * (quota.requests_per_s or math.inf))
            self.rows = min(self.most_rows, self.rows + passed * (quota.rows_per_s or math.inf))

    def is_full(self, now: float) -> bool:
        """Return whether the buckets are full, so that the account can be dropped."""
        self.fill(self.quota, now)
        return self.requests >= self.most_requests and self.rows >= self.most_rows

    def _bound(self, quota: Quota) -> None:
        self.quota = quota
        self.most_requests, self.most_rows = _burst(quota.requests_per_s), _burst(quota.rows_per_s)
        self.requests = math.inf if quota.requests_per_s is None else min(self.most_requests, self.requests)
        self.rows = math.inf if quota.rows_per_s is None else min(self.most_rows, self.rows)


@dataclass(frozen=True)
class RequestRate:
    """What is left of a tenant's requests.

    Attributes:
        limit: requests that a full bucket allows.
        remaining: requests that it allows now.
        reset: seconds until it is full.
    """

    limit: int
    remaining: int
    reset: float


class Meter:
    """Token buckets of requests and rows per tenant; not thread-safe, used on the event loop only.

    Args:
        quota: returns the current quota of a tenant.
    """

    def __init__(self, quota: Callable[[str], Quota]) -> None:
        self._quota = quota
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # only tenants with limits

    def __len__(self) -> int:
        """Return the number of accounts."""
        return len(self._accounts)

    def spend_request(self, tenant: str, now: float) -> None:
        """Spend a request of a tenant's quota before the body is read; never refunded.

        Args:
            tenant: tenant of the request.
            now: time of a monotonic clock in seconds.

        Raises:
            QuotaExceeded: the bucket is empty; `retry_after` is the time until a request is allowed.
        """
        quota = self._quota(tenant)
        if quota.requests_per_s is None:
            return
        account = self._account(tenant, quota, now)
        if account.requests < 1:
            missing = 1 - account.requests
            raise _exceeded(tenant, missing / quota.requests_per_s, quota.requests_per_s, "requests")
        account.requests -= 1

    def request_rate(self, tenant: str, now: float) -> RequestRate | None:
        """Return what is left of a tenant's requests; None without a limit.

        Args:
            tenant: tenant of the request.
            now: time of a monotonic clock in seconds.
        """
        quota = self._quota(tenant)
        if quota.requests_per_s is None:
            return None
        account = self._account(tenant, quota, now)
        missing = account.most_requests - account.requests
        return RequestRate(int(account.most_requests), max(0, int(account.requests)), missing / quota.requests_per_s)

    def spend_rows(self, tenant: str, rows: int, now: float) -> None:
        """Spend all rows of a request of a tenant's quota, or none.

        Args:
            tenant: tenant of the request.
            rows: number of rows in the request.
            now: time of a monotonic clock in seconds.

        Raises:
            QuotaExceeded: too few tokens; `retry_after` is the time until as many rows are allowed.
        """
        quota = self._quota(tenant)
        if quota.rows_per_s is None:
            return
        account = self._account(tenant, quota, now)
        # A request larger than a burst needs a full bucket, and leaves a negative balance.
        needed = min(rows, account.most_rows)
        if account.rows < needed:
            raise _exceeded(tenant, (needed - account.rows) / quota.rows_per_s, quota.rows_per_s, "rows")
        account.rows -= rows

    def _account(self, tenant: str, quota: Quota, now: float) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            self._forget(now)
            account = self._accounts[tenant] = _Account(quota, now)
        account.fill(quota, now)
        return account

    def _forget(self, now: float) -> None:
        # Checking two accounts per new account, in turn, bounds both memory and the cost of a request.
        if len(self._accounts) < _KEPT:
            return
        for _ in range(min(2, len(self._accounts))):
            tenant, account = self._accounts.popitem(last=False)
            if not account.is_full(now):
                self._accounts[tenant] = account


def _burst(rate: float | None) -> float:
    return math.inf if rate is None else max(rate, 1.0)


def _exceeded(tenant: str, wait: float, rate: float, what: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"run a request of tenant {tenant!r}",
        expected=f"at most {rate:g} {what} a second",
        got="more",
        fix=f"Send it again in {wait:.3g} s.",
        retry_after=wait,
    )


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
