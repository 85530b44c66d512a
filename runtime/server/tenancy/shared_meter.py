"""The meter of a server that holds shares of the tenants' rates; see `shares`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.tenancy.meter import LIMITS, Account, Meter, RateLeft, TokenBucket
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.shares import LEASE, PERIOD, LeaseGrant, LeaseReport, RateDemand

__all__ = ["LeaseFigures", "SharedMeter", "rate_key"]

_MOVE = 3 * PERIOD  # in which a share moves to the server that is asked
_LATELY = 10.0  # seconds
_AVERAGED = 4.0  # seconds over which demand is averaged
_SERVED = 60.0  # seconds over which allowed amounts are averaged
_KEPT_BASES = 64
_ROUNDING = 1e-6


def rate_key(what: str, tenant: str) -> str:
    """Return the name of a tenant's rate among the servers."""
    return f"{what} {tenant}"


@dataclass(frozen=True)
class LeaseFigures:
    """Leases of this server, for the metrics.

    Attributes:
        age: seconds since the beginning of the last renewal.
        servers: number of servers with a lease at that time.
        shares: share of each rate that any server was asked for lately, by its kind and tenant.
    """

    age: float
    servers: int
    shares: Mapping[tuple[str, str], float]


class _ShareBucket(TokenBucket):
    """Token bucket of a share of a rate: so much of its rate and of its burst."""

    __slots__ = ("burst", "full_rate", "share")

    def __init__(self, rate: float, burst: float, share: float, level: float, at: float) -> None:
        super().__init__(rate * share, burst * share, min(level, burst * share), at)
        self.full_rate, self.burst, self.share = rate, burst, share

    def take(self, share: float, now: float) -> float:
        """Change the share, and return the tokens that are given up with it, as a part of the burst."""
        self.fill(now)
        freed = 0.0
        if share < self.share and self.level > 0:
            freed = self.level * (1 - share / self.share)
            self.level -= freed
        self.share, self.rate, self.most = share, self.full_rate * share, self.burst * share
        self.level = min(self.level, self.most)
        return freed / self.burst

    def owes(self, now: float) -> bool:
        """Return whether a request that was larger than a burst is not paid for yet."""
        self.fill(now)
        return self.level < 0

    def wait(self, amount: float) -> float:
        wanted = min(amount, self.burst)
        if self.level >= wanted * (1 - _ROUNDING):
            return 0.0
        if wanted > self.most * (1 + _ROUNDING) or self.rate == 0:
            return _MOVE
        return (wanted - self.level) / self.rate

    @property
    def allowed(self) -> float:
        return self.full_rate

    def left(self) -> RateLeft:
        reset = (self.most - self.level) / self.rate if self.rate > 0 else _MOVE
        return RateLeft(int(self.burst), max(0, int(self.level + _ROUNDING)), max(0.0, reset))


class _SharedAccount(Account):
    __slots__ = ("_open",)

    def __init__(self, quota: Quota, now: float, open_bucket: Callable[[str, float, float], _ShareBucket]) -> None:
        self._open = open_bucket
        super().__init__(quota, now)

    def bound(self, quota: Quota, now: float) -> None:
        self.quota = quota
        before = self.buckets if hasattr(self, "buckets") else {}
        self.buckets = {}
        for name, (field, seconds, _) in LIMITS.items():
            limit = getattr(quota, field)
            if limit is None:
                continue
            rate, burst, own = limit / seconds, max(limit, 1.0), before.get(name)
            if isinstance(own, _ShareBucket):
                own.fill(now)
                self.buckets[name] = _ShareBucket(rate, burst, own.share, own.level, own.at)
            else:
                self.buckets[name] = self._open(name, rate, burst)


class _Use:
    """What was asked of a rate on this server."""

    __slots__ = ("asked", "asked_before", "largest", "largest_at", "last", "served", "served_before")

    def __init__(self) -> None:
        self.asked = self.served = 0.0  # since the last renewal
        self.asked_before = self.served_before = 0.0  # on average
        self.largest = 0.0
        self.largest_at = self.last = -math.inf

    def count(self, amount: float, now: float, *, allowed: bool) -> None:
        self.asked += amount
        self.served += amount if allowed else 0
        self.last = now
        if amount >= self.largest or now - self.largest_at > _LATELY:
            self.largest, self.largest_at = amount, now

    def demand(self, passed: float, rate: float, burst: float, now: float) -> RateDemand:
        """Return the demand, and begin the next period."""
        first = self.asked_before == 0
        self.asked_before = _average(self.asked_before, self.asked / passed, 1.0 if first else passed / _AVERAGED)
        self.served_before = _average(self.served_before, self.served / passed / rate, passed / _SERVED)
        self.asked = self.served = 0.0
        if now - self.last > _LATELY:
            self.asked_before = 0.0
        return RateDemand(self.asked_before, min(1.0, self.largest / burst), self.served_before, burst / rate)


class SharedMeter(Meter):
    """Meter of the shares that a server holds; not thread-safe, used on the event loop only.

    Args:
        quota: returns the current quota of a tenant.
    """

    def __init__(self, quota: Callable[[str], Quota]) -> None:
        super().__init__(quota)
        self._shares: dict[str, float] = {}
        self._uses: dict[tuple[str, str], _Use] = {}
        self._grant = LeaseGrant(1, 0.0, 0.0, {}, {}, {}, 1.0, 1.0)
        self._base = self._reserve = 0.0
        # Shares of the rates that are not in `_shares`, each from its time on, and the level of a full bucket at first.
        self._bases: list[tuple[float, float]] = [(-math.inf, 0.0)]
        self._renewed = -math.inf
        self._reported = -math.inf
        self._fallen = True

    def report(self, server: str, now: float) -> LeaseReport:
        """Give up what has to be given up, and return what to bring to a renewal.

        Args:
            server: name of the server.
            now: time of a monotonic clock in seconds.
        """
        self._check_lease(now)
        freed: dict[str, float] = {}
        if not self._fallen:
            for key, share in self._grant.lower.items():
                bucket = self._bucket(key, now)
                if share >= self._shares.get(key, 0.0) or (bucket is not None and bucket.owes(now)):
                    continue  # what is owed is paid first
                self._shares[key] = share
                if bucket is not None:
                    freed[key] = bucket.take(share, now)
            self._set_base(min(self._base, self._grant.lower_base), now)
            self._reserve = min(self._reserve, self._grant.lower_reserve)
        self._grant.lower = {}
        passed = PERIOD if self._reported == -math.inf else max(1e-3, now - self._reported)
        self._reported = now
        demands = self._demands(passed, now)
        return LeaseReport(server, self._base, self._reserve, dict(self._shares), freed, demands)

    def take(self, grant: LeaseGrant, began: float, now: float) -> None:
        """Use what a renewal has granted, until its lease ends.

        Args:
            grant: the grant.
            began: time at which the renewal began.
            now: time of a monotonic clock in seconds.
        """
        self._check_lease(now)
        for key in self._shares.keys() | grant.shares.keys():
            share, given = grant.shares.get(key, grant.base), grant.given.get(key, 0.0)
            if share == self._shares.get(key) and not given:
                continue
            bucket = self._bucket(key, now)
            if bucket is not None:
                bucket.take(share, now)
                bucket.level = min(bucket.most, bucket.level + given * bucket.burst)
        if grant.first and self._renewed == -math.inf:
            self._bases = [(-math.inf, grant.base)]
            self._base = grant.base
        self._set_base(grant.base, now)
        self._shares, self._reserve, self._grant = dict(grant.shares), grant.reserve, grant
        self._renewed, self._fallen = began, False
        self._check_lease(now)

    def has_begun(self, now: float) -> bool:
        """Return whether other servers have left a share of all rates, or the lease has ended without one."""
        return self._base > 0 or now >= self._renewed + LEASE

    def figures(self, now: float) -> LeaseFigures:
        """Return the leases for the metrics; may be called by any thread."""
        ended = now >= self._renewed + LEASE
        shares = {}
        for key, share in self._shares.copy().items():
            what, _, tenant = key.partition(" ")
            shares[what, tenant] = self._reserve if ended else share
        return LeaseFigures(now - self._renewed, self._grant.servers, shares)

    def refund(self, what: str, tenant: str, amount: int, now: float) -> None:
        """Give back what a request spent and did not use; see `Meter.refund`."""
        super().refund(what, tenant, amount, now)
        use = self._uses.get((what, tenant))
        if use is not None:
            use.served = max(0.0, use.served - amount)

    def _spend(self, what: str, tenant: str, amount: int, now: float) -> None:
        use = self._uses.get((what, tenant))
        if use is None:
            use = self._uses[what, tenant] = _Use()
        try:
            super()._spend(what, tenant, amount, now)
        except QuotaExceeded:
            use.count(amount, now, allowed=False)
            raise
        use.count(amount, now, allowed=True)

    def _account(self, tenant: str, now: float) -> Account:
        self._check_lease(now)
        account = self._accounts.get(tenant)
        if account is not None:
            for what, bucket in account.buckets.items():
                if isinstance(bucket, _ShareBucket) and rate_key(what, tenant) not in self._shares:
                    self._follow(bucket, now)
        return super()._account(tenant, now)

    def _open(self, tenant: str, quota: Quota, now: float) -> Account:
        def bucket(what: str, rate: float, burst: float) -> _ShareBucket:
            own = self._shares.get(rate_key(what, tenant))
            if own is not None:  # its tokens were given away while the tenant had no such limit
                return _ShareBucket(rate, burst, own, 0.0, now)
            # As if it had been there always.
            share, since = self._bases[0][1], self._bases[1][0] if len(self._bases) > 1 else now
            found = _ShareBucket(rate, burst, share, share * burst, since)
            self._follow(found, now)
            return found

        return _SharedAccount(quota, now, bucket)

    def _replaceable(self, tenant: str, account: Account, now: float) -> bool:
        if any(rate_key(what, tenant) in self._shares for what in account.buckets):
            return False
        for bucket in account.buckets.values():
            if isinstance(bucket, _ShareBucket):
                self._follow(bucket, now)
        return super()._replaceable(tenant, account, now)

    def _bucket(self, key: str, now: float) -> _ShareBucket | None:
        """Return the bucket of a rate, opened if the tenant has such a limit."""
        what, _, tenant = key.partition(" ")
        if getattr(self._quota(tenant), LIMITS[what][0]) is None:
            return None
        found = self._account(tenant, now).buckets.get(what)
        return found if isinstance(found, _ShareBucket) else None

    def _follow(self, bucket: _ShareBucket, now: float) -> None:
        """Bring the bucket of a rate that no server was asked for lately to the share that it has by now."""
        for at, share in self._bases[1:]:
            if at >= bucket.at:
                bucket.take(share, at)
        bucket.take(self._base, now)

    def _set_base(self, base: float, at: float) -> None:
        if base != self._base:
            self._base = base
            self._bases.append((at, base))
        if len(self._bases) > _KEPT_BASES:
            (began, share), (_, other) = self._bases[:2]
            self._bases[:2] = [(began, min(share, other))]

    def _check_lease(self, now: float) -> None:
        """Fall back to the reserve at the end of the lease."""
        ends = self._renewed + LEASE
        if self._fallen or now < ends:
            return
        self._fallen = True
        for key in self._shares:
            what, _, tenant = key.partition(" ")
            account = self._accounts.get(tenant)
            bucket = None if account is None else account.buckets.get(what)
            if isinstance(bucket, _ShareBucket):
                bucket.take(self._reserve, ends)
            self._shares[key] = self._reserve
        self._set_base(self._reserve, ends)

    def _demands(self, passed: float, now: float) -> dict[str, RateDemand]:
        found = {}
        for (what, tenant), use in list(self._uses.items()):
            field, seconds, _ = LIMITS[what]
            limit = getattr(self._quota(tenant), field)
            if limit is None or now - use.last > 2 * _SERVED:
                del self._uses[what, tenant]
                continue
            found[rate_key(what, tenant)] = use.demand(passed, limit / seconds, max(limit, 1.0), now)
        return found


def _average(before: float, now: float, part: float) -> float:
    return before + (now - before) * min(1.0, part)
