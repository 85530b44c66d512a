"""Who changed what, and when."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select

from tpeft_deploy.runtime.server.registry import schema
from tpeft_deploy.runtime.server.registry.database import Database

__all__ = ["Audit", "AuditRecord", "write"]


@dataclass(frozen=True)
class AuditRecord:
    """One change.

    Attributes:
        id: rises with time.
        time: seconds since 1970, UTC.
        tenant: whose thing was changed.
        key: id of the key that did it, or "command line".
        action: what was done, e.g. "register".
        target: to what.
        detail: the rest, without secrets.
    """

    id: int
    time: float
    tenant: str
    key: str
    action: str
    target: str
    detail: Mapping[str, Any]


class Audit:
    """The log of changes; each is written in the transaction that makes it.

    Args:
        database: where it is.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, limit: int = 100, before: int | None = None) -> list[AuditRecord]:
        """The newest changes first, of those older than the id `before`."""
        wanted = select(schema.audit).order_by(schema.audit.c.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(schema.audit.c.id < before)
        with self._database.reading() as connection:
            return [AuditRecord(**row) for row in connection.execute(wanted).mappings()]

    def sweep(self, *, days: float | None, rows: int | None) -> int:
        """Remove old entries; how many there were.

        Args:
            days: those that are older; None keeps them.
            rows: all but the newest so many; None keeps them.
        """
        own, gone = schema.audit.c, []
        if days is not None:
            gone.append(own.time < time.time() - 86400 * days)
        with self._database.reading() as connection:
            if rows is not None:
                oldest = connection.scalar(select(own.id).order_by(own.id.desc()).offset(rows).limit(1))
                gone += [] if oldest is None else [own.id <= oldest]
            if not gone or connection.scalar(select(own.id).where(or_(*gone)).limit(1)) is None:
                return 0
        with self._database.writing() as connection:
            return connection.execute(delete(schema.audit).where(or_(*gone))).rowcount


def write(connection: Connection, by: str, tenant: str, action: str, target: str, **detail: Any) -> None:
    """Write a change as part of its transaction."""
    connection.execute(
        insert(schema.audit).values(
            time=time.time(), tenant=tenant, key=by, action=action, target=target, detail=detail
        )
    )
