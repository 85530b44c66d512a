"""The meter that enforces the rates of quotas."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["LIMITS", "Account", "Meter", "RateLeft", "TokenBucket"]

_KEPT = 64  # tenants kept regardless of their remaining tokens


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


@dataclass(slots=True)
class TokenBucket:
    """Token bucket; `at` is the time of its level."""

    rate: float  # a second
    most: float
    level: float
    at: float

    def fill(self, now: float) -> None:
        """Add what the rate has allowed until now."""
        passed = now - self.at
        if passed > 0:
            self.at = now
            self.level = min(self.most, self.level + passed * self.rate)

    def wait(self, amount: float) -> float:
        """Return the seconds until an amount can be spent; more than it ever holds needs a full bucket."""
        # What is larger than a burst leaves a negative level.
        return max(0.0, (min(amount, self.most) - self.level) / self.rate)

    @property
    def allowed(self) -> float:
        """Rate of the quota per second."""
        return self.rate

    def left(self) -> RateLeft:
        """Return what is left now."""
        return RateLeft(int(self.most), max(0, int(self.level)), self.wait(self.most))


# Name of a bucket -> field of the quota, and the time that the field is about.
LIMITS = {
    "requests": ("requests_per_s", 1.0, "a second"),
    "rows": ("rows_per_s", 1.0, "a second"),
    "tokens": ("tokens_per_min", 60.0, "a minute"),
}


class Account:
    """Token buckets of a tenant, by name; each holds what its quota allows in the time that the quota names."""

    __slots__ = ("buckets", "quota")

    def __init__(self, quota: Quota, now: float) -> None:
        self.buckets: dict[str, TokenBucket] = {}
        self.bound(quota, now)

    def bound(self, quota: Quota, now: float) -> None:
        """Take over a quota; levels stay, as far as they fit."""
        self.quota = quota
        before, self.buckets = self.buckets, {}
        for name, (field, seconds, _) in LIMITS.items():
            limit = getattr(quota, field)
            if limit is not None:
                most = max(limit, 1.0)
                own = before.get(name)
                level, at = (most, now) if own is None else (min(most, own.level), own.at)
                self.buckets[name] = TokenBucket(limit / seconds, most, level, at)

    def is_full(self, now: float) -> bool:
        """Return whether the buckets are full, so that the account can be dropped."""
        for own in self.buckets.values():
            own.fill(now)
        return all(own.level >= own.most for own in self.buckets.values())


class Meter:
    """Token buckets of requests, rows and tokens per tenant; not thread-safe, used on the event loop only.

    Args:
        quota: returns the current quota of a tenant.
    """

    def __init__(self, quota: Callable[[str], Quota]) -> None:
        self._quota = quota
        self._accounts: OrderedDict[str, Account] = OrderedDict()  # only tenants with limits

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
        if all(getattr(quota, field) is None for field, _, _ in LIMITS.values()):
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
            _, seconds, time = LIMITS[what]
            raise QuotaExceeded(
                f"run a request of tenant {tenant!r}",
                expected=f"at most {own.allowed * seconds:g} {what} {time}",
                got="more",
                fix=f"Send it again in {wait:.3g} s.",
                retry_after=wait,
            )
        own.level -= amount

    def _account(self, tenant: str, now: float) -> Account:
        quota, account = self._quota(tenant), self._accounts.get(tenant)
        if account is None:
            self._forget(now)
            account = self._accounts[tenant] = self._open(tenant, quota, now)
        elif account.quota is not quota:
            account.bound(quota, now)
        return account

    def _open(self, _tenant: str, quota: Quota, now: float) -> Account:
        return Account(quota, now)

    def _replaceable(self, _tenant: str, account: Account, now: float) -> bool:
        return account.is_full(now)

    def _forget(self, now: float) -> None:
        # Checking two accounts per new account, in turn, bounds both memory and the cost of a request.
        if len(self._accounts) < _KEPT:
            return
        for _ in range(min(2, len(self._accounts))):
            tenant, account = self._accounts.popitem(last=False)
            if not self._replaceable(tenant, account, now):
                self._accounts[tenant] = account
