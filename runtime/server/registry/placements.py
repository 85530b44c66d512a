"""Placements that tenants asked for: pinned versions and unloaded models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Connection, delete, insert, select

from tpeft_deploy.runtime.server.registry import audit, schema
from tpeft_deploy.runtime.server.registry.cached import Latest
from tpeft_deploy.runtime.server.registry.database import TASKS, Database

__all__ = ["PinRecord", "Placed", "Placements", "drop"]

_P, _U = schema.pins, schema.unloaded


@dataclass(frozen=True)
class PinRecord:
    """A pinned version by public names; `folded`: in a separate session."""

    tenant: str
    task: str
    version: str
    folded: bool


@dataclass(frozen=True)
class Placed:
    """All placements at one moment: pins, oldest first, and unloaded models by tenant and name."""

    pins: tuple[PinRecord, ...] = ()
    unloaded: frozenset[tuple[str, str]] = frozenset()

    @cached_property
    def pinned(self) -> Mapping[tuple[str, str], str]:
        """Pinned tasks by tenant and name, each "device" or "folded"."""
        return {(pin.tenant, pin.task): "folded" if pin.folded else "device" for pin in self.pins}


class Placements:
    """Pins and unloaded models, which survive a restart; each change is in the audit log.

    Args:
        database: database of the registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._latest = Latest(Placed())
        self.refresh()

    @property
    def now(self) -> Placed:
        """Placements when they were last read, or changed by this server; never waits."""
        return self._latest.value

    def refresh(self) -> None:
        """Read what this and other servers have changed."""
        with self._database.reading() as connection:
            self._latest.put(*self._read(connection))

    def pins(self, tenant: str | None = None, task: str | None = None) -> list[PinRecord]:
        """List pinned versions of all tasks, or of one, oldest first."""
        wanted = select(_P.c.tenant, _P.c.task, _P.c.version, _P.c.folded).order_by(_P.c.time)
        if tenant is not None:
            wanted = wanted.where(_P.c.tenant == tenant, _P.c.task == task)
        with self._database.reading() as connection:
            return [PinRecord(*row) for row in connection.execute(wanted)]

    def pin(self, pin: PinRecord, *, by: str) -> None:
        """Record a pin."""
        with self._writing() as connection:
            drop(connection, pin.tenant, pin.task, pin.version, unloaded=False)
            connection.execute(
                insert(_P).values(
                    tenant=pin.tenant, task=pin.task, version=pin.version, folded=pin.folded, time=time.time(), by=by
                )
            )
            audit.write(connection, by, pin.tenant, "pin", pin.task, version=pin.version, folded=pin.folded)

    def unpin(self, tenant: str, task: str, *, by: str) -> None:
        """Remove the pins of a task."""
        with self._writing() as connection:
            drop(connection, tenant, task, unloaded=False)
            audit.write(connection, by, tenant, "unpin", task)

    def unload(self, tenant: str, task: str, *, by: str) -> None:
        """Record an unloaded model."""
        with self._writing() as connection:
            connection.execute(delete(_U).where(_U.c.tenant == tenant, _U.c.task == task))
            connection.execute(insert(_U).values(tenant=tenant, task=task, time=time.time(), by=by))
            audit.write(connection, by, tenant, "unload", task)

    def load(self, tenant: str, task: str, *, by: str) -> None:
        """Record that a model is loaded again."""
        with self._writing() as connection:
            connection.execute(delete(_U).where(_U.c.tenant == tenant, _U.c.task == task))
            audit.write(connection, by, tenant, "load", task)

    def forget(self, pin: PinRecord) -> None:
        """Remove the pin of a version that no longer exists, without an audit entry."""
        with self._writing() as connection:
            drop(connection, pin.tenant, pin.task, pin.version, unloaded=False)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._database.writing() as connection:
            yield connection
            self._database.changed(connection, TASKS)
            changes, placed = self._read(connection)
        self._latest.put(changes, placed)

    def _read(self, connection: Connection) -> tuple[int, Placed]:
        pins = connection.execute(select(_P.c.tenant, _P.c.task, _P.c.version, _P.c.folded).order_by(_P.c.time))
        unloaded = connection.execute(select(_U.c.tenant, _U.c.task))
        placed = Placed(tuple(PinRecord(*row) for row in pins), frozenset((row.tenant, row.task) for row in unloaded))
        return self._database.changes(connection, TASKS), placed


def drop(connection: Connection, tenant: str, task: str, version: str | None = None, *, unloaded: bool = True) -> None:
    """Remove the placements of a task, or the pin of one version, as part of a transaction."""
    of_task = (_P.c.tenant == tenant) & (_P.c.task == task)
    connection.execute(delete(_P).where(of_task if version is None else of_task & (_P.c.version == version)))
    if version is None and unloaded:
        connection.execute(delete(_U).where(_U.c.tenant == tenant, _U.c.task == task))
