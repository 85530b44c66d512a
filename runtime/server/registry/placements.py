"""What tenants said of where their tasks are to be: pinned versions, and models that were unloaded."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from tpeft_deploy.runtime.server.registry import audit, schema
from tpeft_deploy.runtime.server.registry.database import Database

__all__ = ["PinRecord", "Placements", "drop"]

_P, _U = schema.pins, schema.unloaded


@dataclass(frozen=True)
class PinRecord:
    """A pinned version, by the names that clients know; `folded`: with a session of its own."""

    tenant: str
    task: str
    version: str
    folded: bool


class Placements:
    """Pins and unloaded models, kept over a restart; each change is in the audit log.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def pins(self, tenant: str | None = None, task: str | None = None) -> list[PinRecord]:
        """Pinned versions, the oldest first: of all tasks, or of one."""
        wanted = select(_P.c.tenant, _P.c.task, _P.c.version, _P.c.folded).order_by(_P.c.time)
        if tenant is not None:
            wanted = wanted.where(_P.c.tenant == tenant, _P.c.task == task)
        with self._database.reading() as connection:
            return [PinRecord(*row) for row in connection.execute(wanted)]

    def unloaded(self) -> list[tuple[str, str]]:
        """Models that were unloaded, by tenant and name."""
        with self._database.reading() as connection:
            return [(tenant, task) for tenant, task in connection.execute(select(_U.c.tenant, _U.c.task))]

    def pin(self, pin: PinRecord, *, by: str) -> None:
        """Note that a version is pinned."""
        with self._database.writing() as connection:
            drop(connection, pin.tenant, pin.task, pin.version, unloaded=False)
            connection.execute(
                insert(_P).values(
                    tenant=pin.tenant, task=pin.task, version=pin.version, folded=pin.folded, time=time.time(), by=by
                )
            )
            audit.write(connection, by, pin.tenant, "pin", pin.task, version=pin.version, folded=pin.folded)

    def unpin(self, tenant: str, task: str, *, by: str) -> None:
        """Note that no version of a task is pinned any more."""
        with self._database.writing() as connection:
            drop(connection, tenant, task, unloaded=False)
            audit.write(connection, by, tenant, "unpin", task)

    def unload(self, tenant: str, task: str, *, by: str) -> None:
        """Note that a model was unloaded."""
        with self._database.writing() as connection:
            connection.execute(delete(_U).where(_U.c.tenant == tenant, _U.c.task == task))
            connection.execute(insert(_U).values(tenant=tenant, task=task, time=time.time(), by=by))
            audit.write(connection, by, tenant, "unload", task)

    def load(self, tenant: str, task: str, *, by: str) -> None:
        """Note that it was loaded again."""
        with self._database.writing() as connection:
            connection.execute(delete(_U).where(_U.c.tenant == tenant, _U.c.task == task))
            audit.write(connection, by, tenant, "load", task)

    def forget(self, pin: PinRecord) -> None:
        """Drop a pin of what is no longer there."""
        with self._database.writing() as connection:
            drop(connection, pin.tenant, pin.task, pin.version, unloaded=False)


def drop(connection: Connection, tenant: str, task: str, version: str | None = None, *, unloaded: bool = True) -> None:
    """Forget a task's placements, or the pin of one version, as part of a transaction."""
    own = (_P.c.tenant == tenant) & (_P.c.task == task)
    connection.execute(delete(_P).where(own if version is None else own & (_P.c.version == version)))
    if version is None and unloaded:
        connection.execute(delete(_U).where(_U.c.tenant == tenant, _U.c.task == task))
