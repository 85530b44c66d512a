"""Who changed what, and when."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select

from tpeft_deploy.runtime.server.registry import database
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
        wanted = select(database.audit).order_by(database.audit.c.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(database.audit.c.id < before)
        with self._database.reading() as connection:
            return [AuditRecord(**row) for row in connection.execute(wanted).mappings()]


def write(connection: Connection, by: str, tenant: str, action: str, target: str, **detail: Any) -> None:
    """Write a change as part of its transaction."""
    connection.execute(
        insert(database.audit).values(
            time=time.time(), tenant=tenant, key=by, action=action, target=target, detail=detail
        )
    )
