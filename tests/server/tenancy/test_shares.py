"""Servers divide a tenant's rate among them, and never use more than a tenth beyond it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.server.shared_rates import Peer, World, worst_excess
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.shares import (
    FORGOTTEN,
    LEASE,
    PERIOD,
    LeaseReport,
    LeaseRow,
    RateDemand,
    RatePart,
    UnassignedShare,
    divide,
    renew,
)

KEY = "requests acme"
demands = st.builds(RateDemand, st.sampled_from([0.0, 0.1, 1.0, 50.0]), st.floats(0, 1), st.floats(0, 1))
parts = st.dictionaries(st.integers(0, 9).map(str), st.builds(RatePart, st.floats(0, 1), demands), min_size=1)


@given(parts.filter(lambda parts: any(part.demand.asked for part in parts.values())))
def test_divided_shares_are_the_whole_rate_and_some_server_has_what_it_needs(own: dict[str, RatePart]) -> None:
    shares, _ = divide(own)
    assert shares.keys() == own.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())
    asked = [server for server, part in own.items() if part.demand.asked]
    assert any(shares[server] >= own[server].demand.need - 1e-9 for server in asked)


def test_shares_follow_the_demand_and_leave_a_little_for_who_begins() -> None:
    own = {name: RatePart(0.3, RateDemand(asked, 0.01)) for name, asked in (("a", 30.0), ("b", 10.0), ("c", 0.0))}
    shares, exact = divide(own)
    assert not exact
    assert shares["c"] == pytest.approx(0.05 / 3)
    assert shares["a"] - shares["c"] == pytest.approx(3 * (shares["b"] - shares["c"]))


def test_servers_take_turns_with_what_cannot_be_divided() -> None:
    own = {name: RatePart(0.0, RateDemand(1.0, 1.0)) for name in "abc"}
    turns = []
    for _ in range(6):
        shares, _ = divide(own)
        (holder,) = (name for name, share in shares.items() if share == 1)
        turns.append(holder)
        for name, part in own.items():
            part.share = shares[name]
            part.demand.served = 1.0 if name == holder else part.demand.served / 2
    assert turns == [*"abcabc"]


class Chaos(World):
    """A world in which anything may fail; `draw` chooses."""

    def happen(self) -> None:
        alive, draw = self.alive, self.draw
        what = draw.random()
        if what < 0.1 and len(alive) < 7:
            self.join()
        elif what < 0.18 and len(alive) > 1:
            draw.choice(alive).alive = False
        elif what < 0.35:
            draw.choice(alive).renew(self.table, self.now, reached=draw.random() < 0.5, answered=False)
        elif what < 0.5:
            for peer in draw.sample(alive, draw.randint(1, len(alive))):
                peer.next = self.now + draw.uniform(1, 12)
        elif what < 0.55:
            self.step(draw.uniform(1, 300))

    def used(self) -> float:
        """The sum of the shares that servers act on."""
        for peer in self.alive:
            peer.meter._check_lease(self.now + peer.offset)
        return sum(peer.meter._shares.get(KEY, peer.meter._base) for peer in self.alive)


@given(st.integers(0, 2**32), st.sampled_from([100.0, 30.0, 3.0, 1.0, 1 / 60]), st.integers(1, 4), st.integers(1, 40))
def test_whatever_fails_servers_allow_at_most_a_tenth_more(seed: int, limit: float, count: int, events: int) -> None:
    own = Chaos(Quota(requests_per_s=limit), count, seed)
    pace, largest = max(1.0, 1 / limit / 3), 1 if limit < 30 else 5
    for _ in range(events):
        own.happen()
        rates = [own.draw.choice([0, 0, limit / 5, limit, 4 * limit]) for _ in own.alive]
        own.drive(own.draw.uniform(0.2, 4) * pace, "requests", rates, own.draw.randint(1, largest), 0.1 * pace)
        assert own.used() <= 1.1 + 1e-6
    assert worst_excess(own.granted, 1.1 * limit) <= 1.1 * max(1.0, limit) + 1e-6


@pytest.mark.parametrize(
    ("quota", "what", "rates", "amount"),
    [
        (Quota(requests_per_s=30), "requests", (20, 20, 20), 1),
        (Quota(requests_per_s=30), "requests", (60, 0, 0), 1),
        (Quota(requests_per_s=30), "requests", (40, 5, 1), 1),
        (Quota(requests_per_s=3), "requests", (10, 10, 10), 1),
        (Quota(rows_per_s=500), "rows", (50, 50, 50), 20),
        (Quota(tokens_per_min=6000), "tokens", (1, 1, 1), 200),
        (Quota(requests_per_s=100), "requests", (20,) * 10, 1),
    ],
)
def test_a_steady_demand_gets_nine_tenths_of_the_limit(
    quota: Quota, what: str, rates: tuple[float, ...], amount: int
) -> None:
    own = World(quota, len(rates))
    own.drive(90, what, rates, amount)
    found = own.drive(60, what, rates, amount)
    limit = {"requests": quota.requests_per_s, "rows": quota.rows_per_s, "tokens": (quota.tokens_per_min or 0) / 60}
    assert 0.9 <= found / (60 * (limit[what] or 0)) <= 1.1


def test_one_request_a_minute_is_one_whichever_server_is_asked() -> None:
    own = World(Quota(requests_per_s=1 / 60), 3)
    own.drive(120, "requests", (0.3,) * 3, step=0.5)
    found = own.drive(3600, "requests", (0.3,) * 3, step=0.5)
    assert 54 <= found <= 61
    assert worst_excess(own.granted, 1 / 60) <= 1 + 1e-6


def test_a_request_that_one_share_is_too_small_for_is_served_after_the_time_it_is_told() -> None:
    own = World(Quota(requests_per_s=1 / 60), 3)
    own.wait(70)
    served = 0
    for peer in own.peers:  # full after each pause, wherever the whole request is
        left = peer.meter.rates("acme", own.now + peer.offset)["requests"]
        assert left.limit == 1
        if not own.ask(peer, "requests", 1):
            own.wait(3.5)
            assert own.ask(peer, "requests", 1)
        served += 1
        own.wait(70)
    assert served == 3


def test_a_killed_servers_share_comes_back_once_its_lease_has_ended() -> None:
    own = World(Quota(requests_per_s=30), 3)
    own.drive(20, "requests", (20, 20, 20))
    own.peers[0].alive = False
    died = own.now
    held = own.table.rows["peer-00"].parts[KEY].share
    while own.now < died + LEASE - PERIOD:
        own.drive(0.1, "requests", (20, 20))
        assert sum(peer.meter._shares[KEY] for peer in own.alive) <= 1 - held + 1e-6
    own.drive(LEASE + 3 * PERIOD, "requests", (20, 20))
    assert sum(peer.meter._shares[KEY] for peer in own.alive) == pytest.approx(1)
    assert own.drive(30, "requests", (20, 20)) >= 0.9 * 30 * 30


def test_a_server_that_cannot_renew_keeps_a_tenth_of_an_equal_part() -> None:
    own = World(Quota(requests_per_s=100), 2)
    own.drive(20, "requests", (80, 80))
    lost = own.peers[0]
    lost.next = float("inf")
    own.drive(20, "requests", (80, 80))
    other = own.peers[1]
    assert lost.meter.figures(own.now + lost.offset).shares == {("requests", "acme"): pytest.approx(0.05)}
    assert other.meter._shares[KEY] == pytest.approx(1)
    served = 0
    for _ in range(80):
        own.step(0.1)
        served += own.ask(lost, "requests", 1)
    assert 8 * 5 * 0.9 <= served <= 8 * 5 + 5
    lost.next = own.now
    own.drive(20, "requests", (80, 80))
    assert lost.meter._shares[KEY] == pytest.approx(0.5, abs=0.05)


def test_a_newcomer_begins() -> None:
    own = World(Quota(requests_per_s=30), 2)
    own.drive(20, "requests", (40, 40))
    joined = own.join()
    own.drive(20, "requests", (40, 40, 40))
    assert joined.meter._shares[KEY] == pytest.approx(1 / 3, abs=0.05)


def test_a_rate_that_nobody_asks_for_is_divided_equally_and_leaves_the_table() -> None:
    own = World(Quota(requests_per_s=30), 3)
    own.drive(20, "requests", (60, 0, 0))
    assert own.peers[0].meter._shares[KEY] > 0.9
    own.wait(700)
    assert not own.table.unassigned
    assert [row.parts for row in own.table.rows.values()] == [{}] * 3
    assert [peer.meter._base for peer in own.peers] == [pytest.approx(1 / 3)] * 3
    assert len(own.peers[0].meter._shares) == 0


def test_leases_of_lost_servers_are_forgotten() -> None:
    rows: dict[str, LeaseRow] = {}
    pools: dict[str, UnassignedShare] = {}
    assert renew(rows, pools, LeaseReport("a"), 0.0).first
    grant = renew(rows, pools, LeaseReport("b"), 1.0)
    assert (grant.base, grant.reserve, grant.first) == (0, 0, False)
    assert renew(rows, pools, LeaseReport("b"), 5.0).base == 1  # after the lease and a period
    renew(rows, pools, LeaseReport("b"), LEASE + FORGOTTEN)
    assert rows.keys() == {"b"}


def test_an_answer_that_is_lost_costs_tokens_and_gives_none() -> None:
    own = World(Quota(requests_per_s=10), 2)
    peer: Peer = own.peers[0]
    own.drive(5, "requests", (20, 0))
    for _ in range(20):
        peer.renew(own.table, own.now, answered=False)
    tokens = sum(own.meter._accounts["acme"].buckets["requests"].level for own in own.peers)
    assert tokens + 10 * own.table.unassigned[KEY].level <= 10
