"""Shares of tenants' rates that servers of one registry hold by leases: the policy, without clock and database.

Each rate of a tenant, such as its requests per second, is divided among the servers. A server uses its share of the
rate and of the burst as long as its lease lasts. A share that moves is given up first by the server that held it, with
the tokens in it, and then taken by another, so that at no time

- the shares of a rate add up to more than 1, and
- the tokens of a rate on all servers add up to more than its burst.

A server whose lease has ended uses its reserve, a tenth of an equal part; the reserves add up to at most 0.1. The
servers together thus allow at most 1.1 times what the quota does, whatever fails.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

__all__ = [
    "FORGOTTEN",
    "LEASE",
    "PERIOD",
    "LeaseGrant",
    "LeaseReport",
    "LeaseRow",
    "RateDemand",
    "RatePart",
    "UnassignedShare",
    "divide",
    "renew",
]

PERIOD = 1.0
"""Seconds between two renewals of a server."""
LEASE = 3.0
"""Seconds for which a renewal lets a server use its shares."""
FORGOTTEN = 3600.0
"""Seconds after the end of a lease for which the reserve of its server is kept."""
_RESERVES = 0.1  # of all servers without a lease
_IDLE_PARTS = 0.05  # of all servers that are not asked, so that they can begin
_MOVED = 0.25  # at most, for servers that need more than is asked of them in proportion
_STAYS = 0.3  # advantage in the order of those that take turns, per share
_IDLE = 600.0  # seconds without a request after which a rate is divided equally
_EXACT = 1e-9


class RateDemand(msgspec.Struct):
    """Demand of a rate on one server.

    Attributes:
        asked: amount per second that was asked for lately, allowed or not; 0 without a request.
        need: largest amount that a request asked for lately, as a part of the tenant's burst, at most 1.
        served: amount that was allowed in the last minute, in units of the tenant's rate.
        fill: seconds in which the tenant's rate fills its burst.
    """

    asked: float = 0.0
    need: float = 0.0
    served: float = 0.0
    fill: float = 1.0


class RatePart(msgspec.Struct):
    """Part of one server in one rate: its share, and its demand."""

    share: float
    demand: RateDemand = msgspec.field(default_factory=RateDemand)


class LeaseRow(msgspec.Struct):
    """Lease of one server.

    Attributes:
        ends: end of the lease in seconds of the registry's clock.
        base: share of each rate that is not in `parts`.
        reserve: share of each rate without a lease.
        parts: rates that any server was asked for lately.
    """

    ends: float
    base: float = 0.0
    reserve: float = 0.0
    parts: dict[str, RatePart] = {}


class UnassignedShare(msgspec.Struct):
    """Tokens of the part of a rate that no server holds.

    Attributes:
        at: time of the level.
        used: time of the last demand.
        level: tokens, as a part of the burst.
    """

    at: float
    used: float
    level: float = 0.0


class LeaseReport(msgspec.Struct):
    """What a server brings to a renewal.

    Attributes:
        server: name of the server.
        base: its share of each rate that is not in `shares`.
        reserve: its share of each rate without a lease.
        shares: its shares of rates, never more than the registry says.
        freed: tokens given up with shares, as parts of the burst.
        demands: rates that were asked for lately.
    """

    server: str
    base: float = 0.0
    reserve: float = 0.0
    shares: dict[str, float] = {}
    freed: dict[str, float] = {}
    demands: dict[str, RateDemand] = {}


class LeaseGrant(msgspec.Struct):
    """What a server takes home from a renewal; what it has to give up, it gives up before the next one.

    Attributes:
        servers: number of servers with a lease.
        base: share of each rate that is not in `shares`.
        reserve: share of each rate without a lease.
        shares: shares of rates.
        given: tokens that come with shares, as parts of the burst.
        lower: shares to give up, by the values that remain.
        lower_base: value to which `base` has to be lowered.
        lower_reserve: value to which `reserve` has to be lowered.
        first: whether no other server held a lease within `FORGOTTEN`, so that no burst can have been used.
    """

    servers: int
    base: float
    reserve: float
    shares: dict[str, float]
    given: dict[str, float]
    lower: dict[str, float]
    lower_base: float
    lower_reserve: float
    first: bool = False


def divide(parts: Mapping[str, RatePart]) -> tuple[dict[str, float], bool]:
    """Divide a rate among servers by their demand.

    A server can only serve a request that its share of the burst has room for. If the demand's proportions give too
    little for that, servers take turns in holding as much as they need.

    Args:
        parts: present part of each server; at least one is asked for.

    Returns:
        Shares that add up to 1, and whether each of them counts: some server needs exactly its share.
    """
    asked = {server: part.demand.asked for server, part in parts.items() if part.demand.asked > 0}
    total = sum(asked.values())
    least = 1 - _MOVED - _IDLE_PARTS
    whole = {server for server in asked if asked[server] / total * least >= parts[server].demand.need}
    granted: dict[str, float] = {}
    budget = _MOVED if whole else 1.0
    for server in sorted(asked.keys() - whole, key=lambda server: _turn(server, parts[server])):
        need = parts[server].demand.need
        if need <= budget + _EXACT:
            granted[server] = need
            budget -= need
    rest = max(0.0, 1 - sum(granted.values()))
    idle = min(_IDLE_PARTS, rest) if rest > 2 * _IDLE_PARTS else 0.0
    shares = {server: granted.get(server, 0.0) + idle / len(parts) for server in parts}
    sharing = whole or granted.keys()
    weight = sum(asked[server] for server in sharing)
    for server in sharing:
        shares[server] += (rest - idle) * asked[server] / weight
    return shares, len(whole) < len(asked)


def renew(
    rows: dict[str, LeaseRow], unassigned: dict[str, UnassignedShare], report: LeaseReport, now: float
) -> LeaseGrant:
    """Renew the lease of a server, as one step that no other server's renewal interrupts.

    Args:
        rows: leases by server; that of the server is replaced, and forgotten ones are removed.
        unassigned: unassigned shares of rates; changed.
        report: use and demand of the server.
        now: time of the registry's clock in seconds.

    Returns:
        What the server may use for `LEASE` seconds from the beginning of its renewal.
    """
    for server in [server for server, row in rows.items() if row.ends + FORGOTTEN <= now]:
        del rows[server]
    me = report.server
    before = rows.get(me)
    kept = before is not None and before.ends + PERIOD > now
    held = {server: row for server, row in rows.items() if server != me and row.ends + PERIOD > now}
    row = LeaseRow(now + LEASE, before.base if before and kept else 0.0, before.reserve if before else 0.0)
    row.parts = before.parts if before and kept else {}
    first = not (rows.keys() - {me}) and before is None
    rows[me] = held[me] = row
    grant = LeaseGrant(len(held), 0.0, 0.0, {}, {}, {}, 1.0, 1.0, first)

    equal = 1 / len(held)
    for key in sorted({*report.demands, *(key for other in held.values() for key in other.parts)}):
        pool = unassigned.setdefault(key, UnassignedShare(now, now))
        local = report.shares.get(key, report.base) if kept else 0.0
        _renew_rate(key, held, pool, report, local, equal, grant, now)
    for key in [key for key in unassigned if not any(key in other.parts for other in held.values())]:
        del unassigned[key]

    row.base = min(row.base, report.base)
    # A rate that some server has in its parts, and this one no more, counts with `base`, which may not grow for it.
    if all(key in row.parts for other in held.values() for key in other.parts):
        row.base += max(0.0, min(equal - row.base, 1 - sum(other.base for other in held.values())))
    row.reserve = min(row.reserve, report.reserve)
    reserve = _RESERVES / len(rows)
    row.reserve += max(0.0, min(reserve - row.reserve, _RESERVES - sum(other.reserve for other in rows.values())))
    grant.base, grant.reserve, grant.lower_base, grant.lower_reserve = row.base, row.reserve, equal, reserve
    return grant


def _renew_rate(
    key: str,
    held: Mapping[str, LeaseRow],
    pool: UnassignedShare,
    report: LeaseReport,
    local: float,
    equal: float,
    grant: LeaseGrant,
    now: float,
) -> None:
    """Renew the part of a server in one rate; `local` is the share that it uses now."""
    row = held[report.server]
    parts = {server: other.parts.get(key) or RatePart(other.base) for server, other in held.items()}
    mine = parts[report.server]
    fill = max((part.demand.fill for part in parts.values()), default=1.0)
    mine.demand = report.demands.get(key) or RateDemand(fill=fill)
    free = max(0.0, 1 - sum(part.share for part in parts.values()))
    # A lease that ended since then was used at most until a period ago.
    passed = min(max(0.0, now - pool.at), PERIOD)
    pool.level, pool.at = min(free, pool.level + free * passed / max(fill, mine.demand.fill)), now
    free += max(0.0, mine.share - local)
    mine.share = min(mine.share, local)
    pool.level = min(free, pool.level + report.freed.get(key, 0.0))

    if any(part.demand.asked > 0 for part in parts.values()):
        pool.used = now
        targets, exact = divide(parts)
        target = targets[report.server]
    elif now - pool.used > _IDLE:
        target, exact = equal, True
    else:
        target, exact = mine.share, True
    if target > mine.share and free > 0:
        taken = min(target - mine.share, free)
        grant.given[key] = pool.level * (taken / free)
        pool.level -= grant.given[key]
        mine.share += taken
    # Small differences are left, as tokens that move with shares are not used meanwhile.
    elif target < mine.share * (1 - (0 if exact else 0.05)) - (0 if exact else 0.002):
        grant.lower[key] = target
    if now - pool.used > _IDLE and abs(mine.share - min(row.base, report.base)) <= _EXACT:
        row.parts.pop(key, None)
    else:
        row.parts[key] = mine
        grant.shares[key] = mine.share


def _turn(server: str, part: RatePart) -> tuple[float, float, str]:
    """Order of servers that take turns: those that served least, but the one whose turn it is stays for a while."""
    has = part.share >= part.demand.need - _EXACT
    return part.demand.served - (_STAYS * part.share if has else 0.0), -part.share, server
