"""Quotas of tenants, and the meter that enforces rates."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from tpeft_deploy.errors import ProtocolError, QuotaExceeded, TooLarge

__all__ = ["Meter", "Quota", "Quotas", "RateLeft", "queue_shares"]

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


@dataclass(slots=True)
class _Bucket:
    """Token bucket; `at` is the time of its level."""

    rate: float  # a second
    most: float
    level: float
    at: float

    def fill(self, now: float) -> None:
        passed = now - self.at
        if passed > 0:
            self.at = now
            self.level = min(self.most, self.level + passed * self.rate)

    def wait(self, amount: float) -> float:
        """Return the seconds until an amount can be spent; more than it ever holds needs a full bucket."""
        # What is larger than a burst leaves a negative level.
        return max(0.0, (min(amount, self.most) - self.level) / self.rate)

    def left(self) -> RateLeft:
        return RateLeft(int(self.most), max(0, int(self.level)), self.wait(self.most))


# Name of a bucket -> field of the quota, and the time that the field is about.
_LIMITS = {
    "requests": ("requests_per_s", 1.0, "a second"),
    "rows": ("rows_per_s", 1.0, "a second"),
    "tokens": ("tokens_per_min", 60.0, "a minute"),
}


class _Account:
    """Token buckets of a tenant, by name; each holds what its quota allows in the time that the quota names."""

    __slots__ = ("buckets", "quota")

    def __init__(self, quota: Quota, now: float) -> None:
        self.buckets: dict[str, _Bucket] = {}
        self.bound(quota, now)

    def bound(self, quota: Quota, now: float) -> None:
        """Take over a quota; levels stay, as far as they fit."""
        self.quota = quota
        before, self.buckets = self.buckets, {}
        for name, (field, seconds, _) in _LIMITS.items():
            limit = getattr(quota, field)
            if limit is not None:
                most = max(limit, 1.0)
                own = before.get(name)
                level, at = (most, now) if own is None else (min(most, own.level), own.at)
                self.buckets[name] = _Bucket(limit / seconds, most, level, at)

    def is_full(self, now: float) -> bool:
        """Return whether the buckets are full, so that the account can be dropped."""
        for own in self.buckets.values():
            own.fill(now)
        return all(own.level >= own.most for own in self.buckets.values())


@dataclass(frozen=True)
class RateLeft:
    """What is left of one of a tenant's rates.

    Attributes:
        limit: amount that a full bucket allows.
        remaining: amount that it allows now.
        reset: seconds until it is full.
    """

    limit: int
    remaining: int
    reset: float


class Meter:
    """Token buckets of requests, rows and tokens per tenant; not thread-safe, used on the event loop only.

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
        if self._quota(tenant).requests_per_s is not None:
            self._spend("requests", tenant, 1, now)

    def spend_rows(self, tenant: str, rows: int, now: float) -> None:
        """Spend all rows of a request of a tenant's quota, or none.

        Args:
            tenant: tenant of the request.
            rows: number of rows in the request.
            now: time of a monotonic clock in seconds.

        Raises:
            QuotaExceeded: too few rows are left; `retry_after` is the time until as many are allowed.
        """
        if self._quota(tenant).rows_per_s is not None:
            self._spend("rows", tenant, rows, now)

    def spend_tokens(self, tenant: str, tokens: int, now: float) -> None:
        """Spend the tokens of a request's prompts, and those that it may generate, or none.

        Args:
            tenant: tenant of the request.
            tokens: number of tokens.
            now: time of a monotonic clock in seconds.

        Raises:
            QuotaExceeded: too few tokens are left; `retry_after` is the time until as many are allowed.
        """
        if self._quota(tenant).tokens_per_min is not None:
            self._spend("tokens", tenant, tokens, now)

    def spend_work(self, tenant: str, rows: int, tokens: int, now: float) -> None:
        """Spend the rows and tokens of a request of a tenant's quota, or neither.

        Args:
            tenant: tenant of the request.
            rows: number of rows in the request.
            tokens: tokens of its prompts, and those that it may generate.
            now: time of a monotonic clock in seconds.

        Raises:
            QuotaExceeded: too few are left; `retry_after` is the time until as many are allowed.
        """
        self.spend_rows(tenant, rows, now)
        try:
            self.spend_tokens(tenant, tokens, now)
        except QuotaExceeded:
            self.refund("rows", tenant, rows, now)
            raise

    def refund(self, what: str, tenant: str, amount: int, now: float) -> None:
        """Give back what a request spent and did not use.

        Args:
            what: "rows" or "tokens".
            tenant: tenant of the request.
            amount: number of them.
            now: time of a monotonic clock in seconds.
        """
        own = self._account(tenant, now).buckets.get(what)
        if own is not None:
            own.fill(now)
            own.level = min(own.most, own.level + amount)

    def rates(self, tenant: str, now: float) -> dict[str, RateLeft]:
        """Return what is left of a tenant's limited rates: "requests", "rows" or "tokens".

        Args:
            tenant: tenant of the request.
            now: time of a monotonic clock in seconds.
        """
        quota = self._quota(tenant)
        if all(getattr(quota, field) is None for field, _, _ in _LIMITS.values()):
            return {}
        buckets = self._account(tenant, now).buckets
        for own in buckets.values():
            own.fill(now)
        return {name: own.left() for name, own in buckets.items()}

    def _spend(self, what: str, tenant: str, amount: int, now: float) -> None:
        own = self._account(tenant, now).buckets[what]
        own.fill(now)
        wait = own.wait(amount)
        if wait > 0:
            _, seconds, time = _LIMITS[what]
            raise QuotaExceeded(
                f"run a request of tenant {tenant!r}",
                expected=f"at most {own.rate * seconds:g} {what} {time}",
                got="more",
                fix=f"Send it again in {wait:.3g} s.",
                retry_after=wait,
            )
        own.level -= amount

    def _account(self, tenant: str, now: float) -> _Account:
        quota, account = self._quota(tenant), self._accounts.get(tenant)
        if account is None:
            self._forget(now)
            account = self._accounts[tenant] = _Account(quota, now)
        elif account.quota is not quota:
            account.bound(quota, now)
        return account

    def _forget(self, now: float) -> None:
        # Checking two accounts per new account, in turn, bounds both memory and the cost of a request.
        if len(self._accounts) < _KEPT:
            return
        for _ in range(min(2, len(self._accounts))):
            tenant, account = self._accounts.popitem(last=False)
            if not account.is_full(now):
                self._accounts[tenant] = account


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
