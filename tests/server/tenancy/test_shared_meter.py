"""A server's shares of rates: what it may spend, what it gives up, and what it tells clients."""

from __future__ import annotations

import pytest

from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.shared_meter import SharedMeter
from tpeft_deploy.runtime.server.tenancy.shares import LEASE, LeaseGrant

KEY = "rows acme"


def grant(
    base: float = 1.0,
    shares: dict[str, float] | None = None,
    given: dict[str, float] | None = None,
    lower: dict[str, float] | None = None,
    *,
    first: bool = False,
) -> LeaseGrant:
    return LeaseGrant(1, base, 0.1, shares or {}, given or {}, lower or {}, 1.0, 0.1, first)


def meter(own: LeaseGrant, **limits: float) -> SharedMeter:
    quota = Quota(**limits)  # type: ignore[arg-type]
    found = SharedMeter(lambda _: quota)
    found.take(own, 0.0, 0.0)
    return found


def spent(own: SharedMeter, rows: int, now: float) -> bool:
    try:
        own.spend_rows("acme", rows, now)
    except QuotaExceeded:
        return False
    return True


def test_the_only_server_has_the_whole_rate_at_once() -> None:
    own = meter(grant(first=True), rows_per_s=10)
    assert spent(own, 10, 0.0)
    assert not spent(own, 1, 0.05)
    assert spent(own, 1, 0.11)


def test_a_server_beside_others_begins_without_tokens_and_fills_its_share() -> None:
    own = meter(grant(0.5), rows_per_s=10)
    assert not spent(own, 1, 0.1)
    assert spent(own, 5, 1.1)
    assert not spent(own, 1, 1.2)


def test_tokens_leave_with_a_share_and_come_with_one() -> None:
    own = meter(grant(0.5, {KEY: 0.8}, lower={KEY: 0.2}, first=True), rows_per_s=100)
    own.spend_rows("acme", 1, 2.0)
    report = own.report("one", 2.0)
    assert report.shares == {KEY: 0.2}
    assert report.freed[KEY] == pytest.approx(0.79 * 0.75)
    assert report.demands[KEY].need == 0.01
    own.take(grant(0.5, {KEY: 0.6}, {KEY: 0.3}), 2.0, 2.0)
    left = own.rates("acme", 2.0)["rows"]
    assert left.limit == 100
    assert left.remaining == int(79 * 0.25 + 30)


def test_what_is_owed_is_paid_before_a_share_moves() -> None:
    own = meter(grant(1.0, {KEY: 1.0}, lower={KEY: 0.0}, first=True), rows_per_s=10)
    own.spend_rows("acme", 25, 1.0)  # more than a burst
    assert own.report("one", 2.0).shares == {KEY: 1.0}


def test_a_request_for_which_the_share_is_too_small_is_told_to_come_when_it_may_have_moved() -> None:
    own = meter(grant(0.5, first=True), rows_per_s=10)
    with pytest.raises(QuotaExceeded, match="at most 10 rows a second") as caught:
        own.spend_rows("acme", 8, 2.0)
    assert caught.value.retry_after == 3
    own = meter(grant(0.0), rows_per_s=10)
    assert own.rates("acme", 1.0)["rows"].reset == 3
    with pytest.raises(QuotaExceeded):
        own.spend_rows("acme", 1, 1.0)


def test_the_reserve_begins_with_the_end_of_the_lease() -> None:
    own = meter(grant(first=True), rows_per_s=100)
    assert own.has_begun(0.0)
    assert spent(own, 100, LEASE - 0.5)
    assert own.rates("acme", LEASE)["rows"].remaining == 5  # a tenth of what half a second brought
    assert own.rates("acme", LEASE + 10)["rows"].remaining == 10
    assert own.figures(LEASE + 10).age == LEASE + 10


def test_unused_tokens_come_back_as_far_as_the_share_has_room() -> None:
    own = meter(grant(0.5, first=True), tokens_per_min=600)
    own.spend_tokens("acme", 300, 0.0)
    own.refund("tokens", "acme", 200, 0.0)
    assert own.rates("acme", 0.0)["tokens"].remaining == 200
    own.refund("tokens", "acme", 200, 0.0)
    assert own.rates("acme", 0.0)["tokens"].remaining == 300


def test_tenants_that_come_once_are_forgotten_and_find_the_same_tokens() -> None:
    own = meter(grant(0.5), requests_per_s=2)
    for number in range(1000):
        own.take(grant(0.5), float(number), float(number))
        own.spend_request(f"tenant {number}", number + 1.5)
    assert len(own) <= 64


def test_a_quota_may_change() -> None:
    quotas = [Quota()]
    own = SharedMeter(lambda _: quotas[-1])
    own.take(grant(0.5, {KEY: 0.5}, first=True), 0.0, 0.0)
    own.spend_rows("acme", 10**6, 0.0)
    quotas.append(Quota(rows_per_s=10))
    assert not spent(own, 5, 0.0)
    assert spent(own, 5, 1.1)
    quotas.append(Quota(rows_per_s=20))
    assert spent(own, 5, 2.5)
    assert not spent(own, 1, 2.5)
    assert own._accounts["acme"].buckets["rows"].most == 10
