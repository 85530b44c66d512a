"""Audit log of changes."""

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
        id: number that rises with time.
        time: seconds since 1970, UTC.
        tenant: tenant that the change is about.
        key: id of the key that made the change, or "command line".
        action: kind of change, e.g. "register".
        target: name of the changed task, key or tenant.
        detail: further values, without secrets.
    """

    id: int
    time: float
    tenant: str
    key: str
    action: str
    target: str
    detail: Mapping[str, Any]


class Audit:
    """Audit log; each entry is written in the transaction of its change.

    Args:
        database: database of the registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, limit: int = 100, before: int | None = None) -> list[AuditRecord]:
        """List changes, newest first.

        Args:
            limit: maximum number of entries.
            before: id that the entries are older than; None: no bound.
        """
        wanted = select(schema.audit).order_by(schema.audit.c.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(schema.audit.c.id < before)
        with self._database.reading() as connection:
            return [AuditRecord(**row) for row in connection.execute(wanted).mappings()]

    def sweep(self, *, days: float | None, rows: int | None) -> int:
        """Remove old entries and return their number.

        Args:
            days: age from which entries are removed; None: any age stays.
            rows: number of entries that stay; None: all.
        """
        columns, expired = schema.audit.c, []
        if days is not None:
            expired.append(columns.time < time.time() - 86400 * days)
        with self._database.reading() as connection:
            if rows is not None:
                oldest = connection.scalar(select(columns.id).order_by(columns.id.desc()).offset(rows).limit(1))
                expired += [] if oldest is None else [columns.id <= oldest]
            if not expired or connection.scalar(select(columns.id).where(or_(*expired)).limit(1)) is None:
                return 0
        with self._database.writing() as connection:
            return connection.execute(delete(schema.audit).where(or_(*expired))).rowcount


def write(connection: Connection, by: str, tenant: str, action: str, target: str, **detail: Any) -> None:
    """Write an entry as part of the transaction of its change."""
    connection.execute(
        insert(schema.audit).values(
            time=time.time(), tenant=tenant, key=by, action=action, target=target, detail=detail
        )
    )
