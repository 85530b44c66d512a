"""What tenants are allowed, and the meter that says when it is used up."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields

from tpeft_deploy.errors import ProtocolError, QuotaExceeded, TooLarge

__all__ = ["Meter", "Quota", "queue_shares"]


_KEPT = 64  # tenants that are remembered, whatever they have left


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
        pins: versions that stay on the device.
        folded: of those, the ones with sessions of their own.

    Raises:
        ProtocolError: a limit that makes no sense.
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


@dataclass(slots=True)
class _Account:
    """What a tenant has left: tokens come at a rate, and as many are kept as one second brings, or 1."""

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
        """Whether it would be the same to have none."""
        self.fill(self.quota, now)
        return self.requests >= self.most_requests and self.rows >= self.most_rows

    def _bound(self, quota: Quota) -> None:
        self.quota = quota
        self.most_requests, self.most_rows = _burst(quota.requests_per_s), _burst(quota.rows_per_s)
        self.requests = math.inf if quota.requests_per_s is None else min(self.most_requests, self.requests)
        self.rows = math.inf if quota.rows_per_s is None else min(self.most_rows, self.rows)


class Meter:
    """Token buckets of requests and rows, per tenant.  Belongs to one thread: the event loop's.

    Args:
        quota: a tenant's quota now.
    """

    def __init__(self, quota: Callable[[str], Quota]) -> None:
        self._quota = quota
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # only of tenants that have limits

    def __len__(self) -> int:
        """Tenants of whom something is remembered."""
        return len(self._accounts)

    def spend_request(self, tenant: str, now: float) -> None:
        """Take a request from a tenant's quota; before its body is read, so it stays spent whatever comes of it.

        Args:
            tenant: whose.
            now: seconds of any clock that does not run backwards.

        Raises:
            QuotaExceeded: with the seconds after which a request is allowed.
        """
        quota = self._quota(tenant)
        if quota.requests_per_s is None:
            return
        account = self._account(tenant, quota, now)
        if account.requests < 1:
            missing = 1 - account.requests
            raise _exceeded(tenant, missing / quota.requests_per_s, quota.requests_per_s, "requests")
        account.requests -= 1

    def spend_rows(self, tenant: str, rows: int, now: float) -> None:
        """Take the rows of a request from a tenant's quota, or nothing at all.

        Args:
            tenant: whose.
            rows: of the request.
            now: seconds of any clock that does not run backwards.

        Raises:
            QuotaExceeded: with the seconds after which as many rows are allowed.
        """
        quota = self._quota(tenant)
        if quota.rows_per_s is None:
            return
        account = self._account(tenant, quota, now)
        # What is larger than a burst waits for a full bucket and leaves a debt.
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
        # Two for each that comes, in turn: what is full goes, and no request pays for all.
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
    """What refuses a request that would let a tenant take more of the queue than its share; see `Fair`.

    Args:
        quota: a tenant's quota now.
        max_queue_rows: of the whole queue.

    Returns:
        Raises for a tenant, its rows that wait, and those of the request: TooLarge for one that is larger than the
        share and could never wait, QuotaExceeded for one that has to come later.
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
