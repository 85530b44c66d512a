"""Servers that share a registry, without one: their meters, and its table, on a clock that the test moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.shared_meter import SharedMeter
from tpeft_deploy.runtime.server.tenancy.shares import (
    PERIOD,
    LeaseGrant,
    LeaseReport,
    LeaseRow,
    UnassignedShare,
    renew,
)


@dataclass
class Table:
    """The registry's leases; its clock is `offset` seconds ahead of the world's."""

    offset: float = 0.0
    rows: dict[str, LeaseRow] = field(default_factory=dict)
    unassigned: dict[str, UnassignedShare] = field(default_factory=dict)

    def renew(self, report: LeaseReport, now: float) -> LeaseGrant:
        grant = renew(self.rows, self.unassigned, report, now + self.offset)
        # As stored and read again: no server shares an object with the table.
        self.rows = msgspec.json.decode(msgspec.json.encode(self.rows), type=dict[str, LeaseRow])
        return msgspec.json.decode(msgspec.json.encode(grant), type=LeaseGrant)


@dataclass
class Peer:
    """One server; its clock is `offset` seconds ahead of the world's, and its renewals come at `next`."""

    name: str
    meter: SharedMeter
    offset: float
    next: float
    alive: bool = True

    def renew(self, table: Any, now: float, *, reached: bool = True, answered: bool = True) -> None:
        """Renew the lease; the request or its answer may be lost."""
        own = now + self.offset
        report = self.meter.report(self.name, own)
        if reached:
            grant = table.renew(report, now)
            if answered:
                self.meter.take(grant, own, own)
        self.next = now + PERIOD

    def ask(self, what: str, amount: int, now: float, tenant: str = "acme") -> bool:
        """Whether a request is allowed."""
        try:
            self.meter._spend(what, tenant, amount, now + self.offset)
        except QuotaExceeded:
            return False
        return True


class World:
    """Peers with one tenant, and what they have granted it: (time, amount)."""

    def __init__(self, quota: Quota, count: int = 0, seed: int = 0) -> None:
        self.quota = quota
        self.table: Any = Table(offset=1e9)
        self.peers: list[Peer] = []
        self.granted: list[tuple[float, float]] = []
        self.draw = random.Random(seed)
        self.now = 0.0
        for _ in range(count):
            self.join()

    def join(self, name: str | None = None) -> Peer:
        meter = SharedMeter(lambda _: self.quota)
        peer = Peer(name or f"peer-{len(self.peers):02}", meter, self.draw.uniform(0, 1e5), self.now)
        self.peers.append(peer)
        peer.renew(self.table, self.now)
        peer.next = self.now + self.draw.uniform(0, PERIOD)
        return peer

    @property
    def alive(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.alive]

    def step(self, seconds: float) -> None:
        """Let time pass, and renew what is due."""
        self.now += seconds
        for peer in self.alive:
            if self.now >= peer.next:
                peer.renew(self.table, self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass in small steps."""
        for _ in range(round(seconds / 0.1)):
            self.step(0.1)

    def ask(self, peer: Peer, what: str, amount: int) -> bool:
        if not peer.ask(what, amount, self.now):
            return False
        self.granted.append((self.now, amount))
        return True

    def total(self, since: float = 0.0) -> float:
        return sum(amount for at, amount in self.granted if at >= since)

    def drive(self, seconds: float, what: str, rates: Sequence[float], amount: int = 1, step: float = 0.05) -> float:
        """Ask each living peer for so many requests a second, at random times; what was granted."""
        began = self.now
        while self.now < began + seconds:
            self.step(step)
            for peer, rate in zip(self.alive, rates, strict=True):
                for _ in range(sum(self.draw.random() < rate * step / 8 for _ in range(8))):
                    self.ask(peer, what, amount)
        return self.total(began)


def worst_excess(granted: Sequence[tuple[float, float]], rate: float) -> float:
    """The most that any window has beyond a rate."""
    most = level = 0.0
    before = None
    for at, amount in granted:
        if before is not None:
            level = max(0.0, level - (at - before) * rate)
        before, level = at, level + amount
        most = max(most, level)
    return most
