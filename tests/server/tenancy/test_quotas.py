"""Quotas let through what they say, and tell when to come again."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpeft_deploy.errors import ProtocolError, QuotaExceeded
from tpeft_deploy.runtime.server.tenancy.meter import Meter
from tpeft_deploy.runtime.server.tenancy.quotas import Quota


def meter(**limits: float) -> Meter:
    quota = Quota(**limits)  # type: ignore[arg-type]
    return Meter(lambda _: quota)


def allowed(own: Meter, now: float, rows: int = 1, tenant: str = "a") -> bool:
    try:
        own.spend_request(tenant, now)
        own.spend_rows(tenant, rows, now)
    except QuotaExceeded:
        return False
    return True


def test_a_burst_of_a_second_and_then_the_rate() -> None:
    own = meter(requests_per_s=10)
    assert sum(allowed(own, 0.0) for _ in range(50)) == 10
    assert not allowed(own, 0.05)
    assert allowed(own, 0.101)
    assert sum(allowed(own, 100.0) for _ in range(50)) == 10


def test_tenants_do_not_share() -> None:
    own = meter(requests_per_s=1)
    assert allowed(own, 0.0, tenant="a")
    assert allowed(own, 0.0, tenant="b")
    assert not allowed(own, 0.0, tenant="a")


def test_no_rows_are_taken_by_a_request_that_is_refused_and_it_stays_a_request() -> None:
    own = meter(requests_per_s=100, rows_per_s=10)
    assert allowed(own, 0.0, rows=10)
    for _ in range(50):
        assert not allowed(own, 0.0, rows=1)
    assert allowed(own, 0.1, rows=1)
    for _ in range(58):
        assert not allowed(own, 0.1, rows=1)
    with pytest.raises(QuotaExceeded, match="100 requests a second"):
        own.spend_request("a", 0.1)


def test_a_request_larger_than_a_burst_waits_for_a_full_bucket_and_is_paid_for() -> None:
    own = meter(rows_per_s=10)
    assert allowed(own, 0.0, rows=35)
    assert not allowed(own, 2.5, rows=1)
    assert allowed(own, 2.7, rows=1)


@given(st.floats(0.1, 1e4), st.integers(1, 500), st.floats(0, 10))
def test_who_waits_as_long_as_told_is_let_through(rate: float, rows: int, later: float) -> None:
    own = meter(rows_per_s=rate)
    while allowed(own, later, rows):
        pass
    with pytest.raises(QuotaExceeded) as caught:
        own.spend_rows("a", rows, later)
    wait = caught.value.retry_after
    assert wait is not None
    assert allowed(own, math.nextafter(later + wait, math.inf) + 1e-6 * (1 + wait), rows)


@given(st.floats(1, 100), st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 5)), max_size=200))
def test_never_more_than_the_rate_and_one_burst(rate: float, steps: list[tuple[float, int]]) -> None:
    own = meter(rows_per_s=rate)
    now = passed = 0.0
    for wait, rows in steps:
        now += wait
        passed += rows if allowed(own, now, rows) else 0
    assert passed <= rate * now + max(rate, 1) + 5


def test_many_tenants_that_come_once_are_forgotten() -> None:
    own = meter(requests_per_s=1)
    for number in range(10_000):
        assert allowed(own, float(number), tenant=f"tenant {number}")
    assert len(own) <= 64


def test_who_still_owes_is_not_forgotten() -> None:
    own = meter(rows_per_s=1)
    assert allowed(own, 0.0, rows=5000)
    for number in range(2000):
        assert allowed(own, float(number), tenant=f"tenant {number}")
    assert not allowed(own, 2000.0)
    assert allowed(own, 5001.0)


def test_both_limits_hold() -> None:
    own = meter(requests_per_s=2, rows_per_s=10)
    assert allowed(own, 0.0, rows=10)
    assert allowed(own, 0.1, rows=1)
    with pytest.raises(QuotaExceeded, match="10 rows a second") as caught:
        own.spend_rows("a", 10, 0.1)
    assert caught.value.retry_after == pytest.approx(1.0)


def test_tokens_are_those_of_a_minute_and_unused_ones_come_back() -> None:
    own = meter(tokens_per_min=600)
    own.spend_tokens("a", 500, 0.0)
    with pytest.raises(QuotaExceeded, match="600 tokens a minute") as caught:
        own.spend_tokens("a", 200, 0.0)
    assert caught.value.retry_after == pytest.approx(10.0)
    own.refund("tokens", "a", 150, 0.0)
    own.spend_tokens("a", 200, 0.0)
    left = own.rates("a", 0.0)["tokens"]
    assert (left.limit, left.remaining) == (600, 50)
    assert left.reset == pytest.approx(55.0)
    own.refund("tokens", "a", 5000, 0.0)
    assert own.rates("a", 0.0)["tokens"].remaining == 600
    own.spend_tokens("a", 1800, 0.0)  # more than a minute's worth, which the next two minutes pay for
    with pytest.raises(QuotaExceeded):
        own.spend_tokens("a", 1, 120.0)
    own.spend_tokens("a", 1, 120.2)
    assert meter().rates("a", 0.0) == {}


def test_work_spends_rows_and_tokens_or_neither() -> None:
    own = meter(rows_per_s=10, tokens_per_min=60)
    own.spend_work("a", 4, 50, 0.0)
    with pytest.raises(QuotaExceeded, match="tokens"):
        own.spend_work("a", 4, 50, 0.0)
    with pytest.raises(QuotaExceeded, match="rows"):
        own.spend_work("a", 9, 5, 0.0)
    assert {name: left.remaining for name, left in own.rates("a", 0.0).items()} == {"rows": 6, "tokens": 10}


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 90), st.integers(0, 90)), max_size=100))
def test_never_more_tokens_than_the_rate_and_a_minute(requests: list[tuple[float, int, int]]) -> None:
    own, now, used = meter(tokens_per_min=60), 0.0, 0
    for wait, reserved, unused in requests:
        now += wait
        try:
            own.spend_tokens("a", reserved, now)
        except QuotaExceeded:
            continue
        own.refund("tokens", "a", min(unused, reserved), now)
        used += reserved - min(unused, reserved)
    assert used <= now + 60 + 90


def test_a_quota_may_change_at_any_time() -> None:
    quotas = [Quota()]
    own = Meter(lambda _: quotas[-1])
    assert all(allowed(own, 0.0) for _ in range(100))
    quotas.append(Quota(requests_per_s=5))
    assert sum(allowed(own, 1.0) for _ in range(50)) == 5
    quotas.append(Quota(requests_per_s=100))
    assert sum(allowed(own, 1.5) for _ in range(100)) == 50
    quotas.append(Quota())
    assert all(allowed(own, 1.5) for _ in range(100))


def test_a_clock_that_stands_still_or_goes_back_gives_nothing_away() -> None:
    own = meter(requests_per_s=1)
    assert allowed(own, 10.0)
    assert not allowed(own, 5.0)
    assert not allowed(own, 10.5)
    assert allowed(own, 11.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("requests_per_s", value) for value in (0, -1, math.nan, math.inf, "many", True)),
        ("tokens_per_min", 0),
        ("queue_share", 1.5),
        ("weight", 0),
        ("weight", None),
        ("adapters", -1),
    ],
)
def test_limits_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=field):
        Quota(**{field: value})  # type: ignore[arg-type]
