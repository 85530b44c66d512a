"""Leases of the servers that share a registry: which part of the tenants' rates each may use."""

from __future__ import annotations

import secrets

import msgspec
from sqlalchemy import Connection, delete, insert, select, text, update

from tpeft_deploy.runtime.server.registry import schema
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.tenancy.shares import LeaseGrant, LeaseReport, LeaseRow, UnassignedShare, renew

__all__ = ["Leases"]

_L = schema.leases
_UNASSIGNED = ""  # the row of what no server holds
_rows = msgspec.json.Decoder(LeaseRow)
_pools = msgspec.json.Decoder(dict[str, UnassignedShare])


class Leases:
    """Lease of this server, and what others have left of the rates; each renewal is one transaction.

    Args:
        database: database of the registry, PostgreSQL.

    Attributes:
        server: name of this server among those that share the registry, new for each process.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.server = secrets.token_hex(8)

    def renew(self, report: LeaseReport) -> LeaseGrant:
        """Renew the lease of this server.

        Args:
            report: use and demand of this server.

        Returns:
            What it may use from now on.

        Raises:
            ServerError, Unavailable: the database does not renew it.
        """
        with self._database.writing("renew the lease of the server") as connection:
            stored = {row.server: row.state for row in connection.execute(select(_L))}
            pools = _pools.decode(stored[_UNASSIGNED]) if _UNASSIGNED in stored else {}
            rows = {server: _rows.decode(state) for server, state in stored.items() if server != _UNASSIGNED}
            grant = renew(rows, pools, report, self._now(connection))
            gone = stored.keys() - rows.keys() - {_UNASSIGNED}
            if gone:
                connection.execute(delete(_L).where(_L.c.server.in_(gone)))
            _write(connection, stored, self.server, rows[self.server])
            _write(connection, stored, _UNASSIGNED, pools)
        return grant

    def leave(self) -> None:
        """End the lease; the caller uses nothing of the rates any more.

        Raises:
            ServerError, Unavailable: the database does not end it, so that it ends by itself.
        """
        with self._database.writing("end the lease of the server") as connection:
            connection.execute(delete(_L).where(_L.c.server == self.server))

    def _now(self, connection: Connection) -> float:
        # Not the time of the transaction's beginning, which may have waited for others.
        return float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")))


def _write(connection: Connection, stored: dict[str, str], server: str, state: object) -> None:
    encoded = msgspec.json.encode(state).decode()
    if server not in stored:
        connection.execute(insert(_L).values(server=server, state=encoded))
    elif stored[server] != encoded:
        connection.execute(update(_L).where(_L.c.server == server).values(state=encoded))
