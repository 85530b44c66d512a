"""Registries on one PostgreSQL divide the tenants' rates; the test moves all clocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.helpers.server.postgres import Postgres
from tests.helpers.server.shared_rates import Peer, World, worst_excess
from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.server.registry import State, open_state
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.shared_meter import SharedMeter
from tpeft_deploy.runtime.server.tenancy.shares import LEASE, PERIOD, LeaseGrant, LeaseReport

KEY = "requests acme"


class Registries:
    """The table of leases in the database, as each server's state uses it."""

    def __init__(self, states: list[State], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.leases = [state.leases for state in states if state.leases is not None]
        for leases in self.leases:
            monkeypatch.setattr(leases, "_now", lambda _: 1e9 + self.now)

    def renew(self, report: LeaseReport, now: float) -> LeaseGrant:
        self.now = now
        return next(own for own in self.leases if own.server == report.server).renew(report)


@pytest.fixture
def states(tmp_path: Path, postgres: Postgres) -> Iterator[list[State]]:
    url, store = postgres.empty(), f"file:{tmp_path / 'store'}"
    states = [open_state(tmp_path / name, url, store=store) for name in ("one", "two", "three")]
    yield states
    for state in states:
        state.close()


@pytest.fixture
def world(states: list[State], monkeypatch: pytest.MonkeyPatch) -> World:
    own = World(Quota(requests_per_s=30))
    own.table = Registries(states, monkeypatch)
    for state in states:
        assert state.leases is not None
        own.join(state.leases.server)
    return own


def stored(state: State) -> set[str]:
    with state._database.reading() as connection:
        return {row.server for row in connection.execute(text("SELECT server FROM leases"))} - {""}


def test_a_tenant_gets_its_limit_of_three_registries_together(world: World) -> None:
    world.drive(10, "requests", (30, 30, 30))
    assert 0.9 * 300 <= world.drive(10, "requests", (30, 30, 30)) <= 1.1 * 300
    world.drive(15, "requests", (90, 1, 0))  # the demand moves, and the shares after it
    assert 0.9 * 300 <= world.drive(10, "requests", (90, 1, 0)) <= 1.1 * 300
    assert worst_excess(world.granted, 30) <= 30 + 1e-6
    assert sum(peer.meter._shares[KEY] for peer in world.peers) <= 1 + 1e-9


def test_the_share_of_a_killed_server_comes_back(world: World, states: list[State]) -> None:
    world.drive(10, "requests", (30, 30, 30))
    world.peers[0].alive = False
    world.drive(LEASE - PERIOD, "requests", (30, 30))
    assert sum(peer.meter._shares[KEY] for peer in world.alive) < 0.9
    world.drive(2 * PERIOD + LEASE, "requests", (30, 30))
    assert 0.9 * 300 <= world.drive(10, "requests", (30, 30)) <= 1.1 * 300
    assert stored(states[1]) == {peer.name for peer in world.peers}


def test_a_server_that_ends_leaves_its_share_at_once(world: World, states: list[State]) -> None:
    world.drive(10, "requests", (30, 30, 30))
    world.peers[0].alive = False
    states[0].close()
    assert stored(states[1]) == {peer.name for peer in world.alive}
    world.drive(2 * PERIOD, "requests", (30, 30))
    assert sum(peer.meter._shares[KEY] for peer in world.alive) == pytest.approx(1)


def test_without_the_table_a_server_keeps_its_reserve(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_state(tmp_path / "one", postgres.empty(), store=f"file:{tmp_path / 'store'}") as state:
        assert state.leases is not None
        leases = state.leases
        table = Registries([state], monkeypatch)
        meter = SharedMeter(lambda _: Quota(requests_per_s=10))
        peer = Peer(leases.server, meter, 0.0, 0.0)
        meter.take(table.renew(meter.report(leases.server, 0.0), 0.0), 0.0, 0.0)
        assert sum(peer.ask("requests", 1, 0.0) for _ in range(20)) == 10
        with state._database.writing() as connection:
            connection.execute(text("DROP TABLE leases"))
        with pytest.raises(ServerError, match="renew the lease of the server"):
            leases.renew(meter.report(leases.server, 1.0))
        assert sum(peer.ask("requests", 1, LEASE - 0.01) for _ in range(20)) == 10
        # A burst of one tenth of the limit is a request.
        assert sum(peer.ask("requests", 1, LEASE + 20.0 + 1.001 * second) for second in range(20)) == 20


def test_the_clock_is_that_of_the_database_when_the_lock_is_held(states: list[State]) -> None:
    leases = states[0].leases
    assert leases is not None
    with states[0]._database.writing() as connection:
        first = leases._now(connection)
        began = float(connection.scalar(text("SELECT extract(epoch FROM now())")))
        assert began <= first < leases._now(connection)


def test_a_server_alone_has_no_leases(tmp_path: Path, postgres: Postgres) -> None:
    for url in (None, postgres.empty()):
        with open_state(tmp_path / str(url is None), url) as state:
            assert state.leases is None
            assert stored(state) == set()
