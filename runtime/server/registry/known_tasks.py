"""Tasks as this server knows them: a snapshot that follows what it and other servers commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import Connection

from tpeft_deploy.runtime.server.registry import queries
from tpeft_deploy.runtime.server.registry.database import TASKS, Database
from tpeft_deploy.runtime.server.registry.snapshot import RegistrySnapshot, TaskRecord, VersionRecord

__all__ = ["KnownTasks", "Told"]

Told = Callable[[list[VersionRecord]], None]
"""Function that is told of versions."""


class KnownTasks:
    """Snapshot of all tasks, and the change counter that it belongs to.

    Reading `snapshot` needs no lock; calls of methods must not overlap.

    Args:
        database: database of the registry.

    Attributes:
        snapshot: current snapshot, replaced as a whole.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._announce: Told = lambda _: None
        self._forget: Told = lambda _: None
        self._places: dict[int, tuple[str, str]] = {}  # id of a task -> its tenant and name in the snapshot
        self.snapshot = RegistrySnapshot({})
        with database.reading() as connection:
            self._seen = database.changes(connection, TASKS)
            self._replace(queries.stored(connection))

    def follow(self, announce: Told, forget: Told) -> None:
        """Announce all known versions, and from now on what other servers change; see `Tasks.follow`."""
        announce(list(self.snapshot.versions()))
        self._announce, self._forget = announce, forget

    def catch_up(self, connection: Connection) -> None:
        """Take over what other servers have committed, as part of a transaction."""
        number = self._database.changes(connection, TASKS)
        if number == self._seen:
            return
        changes = queries.changed_since(connection, self._seen)
        before, after = self._versions(changes), _versions(change.record for change in changes)
        self._announce([version for version in after if version not in before])
        self._replace(changes)
        self._seen = number
        self._forget([version for version in before if version not in after])

    def change(self, connection: Connection, tasks: Iterable[int]) -> tuple[int, list[queries.StoredTask]]:
        """Number the changes that a transaction makes to tasks, and return them for `took`."""
        number = self._database.changed(connection, TASKS)
        for task in tasks:
            queries.touch(connection, task, number)
        return number, queries.changed_since(connection, number - 1)

    def took(self, change: tuple[int, list[queries.StoredTask]], announce: Callable[[TaskRecord], None]) -> None:
        """Replace the snapshot once a change of this server is durable.

        Args:
            change: result of `change`.
            announce: called with each changed task before it is visible.
        """
        for task in change[1]:
            if task.record is not None:
                announce(task.record)
        self._seen = change[0]
        self._replace(change[1])

    def _versions(self, changes: Iterable[queries.StoredTask]) -> dict[VersionRecord, None]:
        places = [self._places[change.id] for change in changes if change.id in self._places]
        return _versions(self.snapshot.own(*place) for place in places)

    def _replace(self, changes: list[queries.StoredTask]) -> None:
        replaced: list[tuple[str, str, TaskRecord | None]] = []
        for task, tenant, name, record in changes:
            place = self._places.pop(task, None)
            if place is not None:
                replaced.append((*place, None))  # a published task has another tenant
            if record is not None:
                self._places[task] = tenant, name
                replaced.append((tenant, name, record))
        self.snapshot = self.snapshot.replaced(replaced)


def _versions(records: Iterable[TaskRecord | None]) -> dict[VersionRecord, None]:
    return {version: None for record in records if record is not None for version in record.versions.values()}
