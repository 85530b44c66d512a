"""Tasks as this server knows them: a snapshot that follows what it and other servers commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Connection

from tpeft_deploy.errors import NotFound
from tpeft_deploy.runtime.server.registry import queries
from tpeft_deploy.runtime.server.registry.database import TASKS, Database
from tpeft_deploy.runtime.server.registry.snapshot import (
    Condition,
    RegistrySnapshot,
    TaskRecord,
    VersionRecord,
)

__all__ = ["KnownTasks", "TaskChange", "TaskChanges", "Told"]

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


@dataclass
class TaskChange:
    """A transaction that changes tasks.

    Attributes:
        connection: connection with the transaction.
        touched: ids of the changed tasks.
        task: id of the one task that is changed; 0 if the transaction did not begin with one.
        done: the changed tasks afterwards, once the change is durable; without those that were deleted.
    """

    connection: Connection
    touched: list[int] = field(default_factory=list)
    task: int = 0
    done: list[TaskRecord] = field(default_factory=list)


class TaskChanges:
    """Transactions on tasks, one after another, and the snapshot that follows them.

    Args:
        database: database of the registry.

    Attributes:
        known: the tasks as they are known; for calls of its methods, the lock is held.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()  # orders short changes, so that the snapshot follows the database
        self.known = KnownTasks(database)

    @property
    def snapshot(self) -> RegistrySnapshot:
        """The current snapshot."""
        return self.known.snapshot

    def follow(self, announce: Told, forget: Told) -> None:
        """Announce all versions, and from now on what other servers change; see `Tasks.follow`."""
        with self._lock:
            self.known.follow(announce, forget)

    def refresh(self) -> None:
        """Take over what other servers have changed."""
        with self._lock, self._database.reading() as connection:
            self.known.catch_up(connection)

    @contextmanager
    def held(self, *, shared: bool) -> Iterator[RegistrySnapshot]:
        """Return the newest snapshot; no server changes a task before the block ends.

        Args:
            shared: whether there are other servers.
        """
        with self._lock:
            if not shared:
                yield self.snapshot
                return
            with self._database.writing() as connection:
                self.known.catch_up(connection)
                yield self.snapshot

    def own(self, tenant: str, name: str) -> TaskRecord:
        """Return a tenant's task, as the snapshot has it.

        Raises:
            NotFound: the tenant has no such task.
        """
        task = self.snapshot.own(tenant, name)
        if task is None:
            raise NotFound(f"find task {name[:128]!r}", problem="there is none of that name that is the tenant's own")
        return task

    @contextmanager
    def changing(
        self, tenant: str, name: str, condition: Condition, announce: Callable[[TaskRecord], None] = lambda _: None
    ) -> Iterator[TaskChange]:
        """Open a transaction on one task of a tenant; see `writing`.

        Raises:
            PreconditionFailed: the condition is false.
            NotFound: the tenant has no such task.
        """
        if self.snapshot.own(tenant, name) is None:
            self.refresh()  # read before it is asked of the one writer
            condition.check(name, self.snapshot.own(tenant, name))
            self.own(tenant, name)
        with self.writing(announce) as change:
            condition.check(name, self.snapshot.own(tenant, name))
            self.own(tenant, name)
            change.task = _id(change.connection, tenant, name)
            change.touched.append(change.task)
            yield change

    @contextmanager
    def writing(self, announce: Callable[[TaskRecord], None] = lambda _: None) -> Iterator[TaskChange]:
        """Open a transaction that begins with the newest snapshot; the snapshot is replaced once it is durable.

        Args:
            announce: called with the changed task before it is visible.
        """
        with self._lock:
            with self._database.writing() as connection:
                self.known.catch_up(connection)
                change = TaskChange(connection)
                yield change
                changed = self.known.change(connection, change.touched)
            self.known.took(changed, announce)
        change.done = [task.record for task in changed[1] if task.record is not None]


def _id(connection: Connection, tenant: str, name: str) -> int:
    row = queries.row(connection, tenant, name)
    if row is None:
        raise NotFound(f"find task {name!r}", problem="it was deleted meanwhile")
    return int(row["id"])


def _versions(records: Iterable[TaskRecord | None]) -> dict[VersionRecord, None]:
    return {version: None for record in records if record is not None for version in record.versions.values()}
