"""Tasks and their versions: each change is one transaction, visible to requests once it is durable."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from pathlib import Path

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import Conflict, NotFound, PreconditionFailed, ServerError
from tpeft_deploy.formats import canonical
from tpeft_deploy.runtime.server.registry import audit, placements, queries
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.registry.files.locks import KeyedLocks
from tpeft_deploy.runtime.server.registry.files.store import AdapterStore
from tpeft_deploy.runtime.server.registry.files.uploads import RunBlocking, Staged, staging
from tpeft_deploy.runtime.server.registry.known_tasks import TaskChanges, Told
from tpeft_deploy.runtime.server.registry.names import check_alias, check_task, check_tenant
from tpeft_deploy.runtime.server.registry.snapshot import (
    ALWAYS,
    CURRENT,
    AliasRecord,
    Condition,
    RegistrySnapshot,
    TaskRecord,
    VersionRecord,
)
from tpeft_deploy.runtime.server.registry.tenants import check_room, ensure
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["AdmissionCheck", "Tasks"]

AdmissionCheck = Callable[[VersionRecord, Adapter], None]
"""Function that raises for an adapter that cannot be served."""

_GRACE = 600.0  # seconds that a deleted adapter's file stays for in-flight requests


class Tasks:
    """Store of tasks and versions.  Changes block; `snapshot` does not.

    Args:
        database: database of the registry.
        blobs: store of the adapters' files.
        incoming: directory for staged uploads.
        quota: function from a tenant to its quota.
        placed: placements, which end with their task.
        shared: whether other servers use the database and the store too.
    """

    def __init__(
        self,
        database: Database,
        blobs: AdapterStore,
        incoming: Path,
        quota: Callable[[str], Quota],
        placed: placements.Placements,
        *,
        shared: bool = False,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._incoming = incoming
        self._quota = quota
        self._placed = placed
        self._shared = shared
        # Held before a transaction: one registration per task at a time, without blocking other tasks during checks.
        self._turns = KeyedLocks()
        self._changes = TaskChanges(database)
        blobs.clean(self._referred)

    def snapshot(self) -> RegistrySnapshot:
        """Return the current snapshot."""
        return self._changes.snapshot

    def follow(self, announce: Told, forget: Told) -> None:
        """Announce all versions, and from now on what other servers change.

        Args:
            announce: called with new versions, before they are visible.
            forget: called with versions that were deleted, once they are not visible any more.
        """
        self._changes.follow(announce, forget)

    def refresh(self) -> None:
        """Take over what other servers have changed."""
        self._changes.refresh()

    def staging(self, limit: int, run: RunBlocking = asyncio.to_thread) -> AbstractAsyncContextManager[Staged]:
        """Create a temporary directory for an upload.

        Args:
            limit: maximum bytes of all files together.
            run: function that runs a blocking call in a thread.
        """
        return staging(self._incoming, limit, run)

    def add(
        self,
        tenant: str,
        name: str,
        adapter: Adapter,
        check: AdmissionCheck,
        *,
        by: str,
        alias: str = CURRENT,
        data: bytes | None = None,
        condition: Condition = ALWAYS,
        withdraw: Callable[[VersionRecord], None] = lambda _: None,
    ) -> VersionRecord:
        """Register a version and point an alias to it.

        A version whose condition is false takes no number, unless the task was changed during the check and another
        server took a later number meanwhile.

        Args:
            tenant: tenant of the task; `SHARED` for a shared task.
            name: name of the task; created when it does not exist.
            adapter: content of the version.
            check: slow check, called when the file is durable and before the version is visible.
            by: id of the key that registers the version.
            alias: alias that points to the version afterwards.
            data: the adapter's canonical file; by default it is encoded here.
            condition: condition that the task has to meet.
            withdraw: called with a version that was not registered although `check` passed.

        Returns:
            The record of the version.

        Raises:
            ProtocolError: a name is invalid.
            Conflict: the name is that of a shared task or, for a shared task, of a tenant's task.
            PreconditionFailed: the condition is false.
            QuotaExceeded: the tenant's quota of adapters or bytes is used up.
        """
        check_task(name)
        check_alias(alias)
        if tenant != SHARED:
            check_tenant(tenant)
        data = adapter.to_bytes() if data is None else data
        with self._turns.hold((tenant, name)):
            # An early check, before the file is written; the transaction below decides.
            self.snapshot().check_owner(tenant, name)
            number = self._next_number(tenant, name, len(data), condition)
            try:
                with self._blobs.pending(data) as digest:
                    record = VersionRecord(tenant, name, number, digest, len(data), time.time(), by)
                    check(record, adapter)
                    try:
                        self._add(record, alias, condition)
                    except BaseException as error:
                        withdraw(record)  # before another registration may get the number
                        if self._shared and isinstance(error, PreconditionFailed):
                            self._return_number(record)
                        raise
            except BaseException:
                # Not left to the sweep: refused uploads would fill the disk until then.
                self._blobs.discard(Blobs.digest(data), self._referred)
                raise
        return record

    def point(
        self,
        tenant: str,
        name: str,
        alias: str,
        version: str,
        *,
        by: str,
        expected: str | None = None,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Point an alias to a version.

        Args:
            tenant: tenant that has the task.
            name: name of the task.
            alias: alias to change.
            version: number or alias of the version to point to.
            by: id of the key that makes the change.
            expected: number of the version that the alias must point to now; None: any.
            condition: condition that the task has to meet.

        Raises:
            ProtocolError: a name is invalid.
            NotFound: the tenant has no such task or version.
            Conflict: the alias does not point to `expected`.
            PreconditionFailed: the condition is false.
        """
        check_task(name)
        check_alias(alias)
        with self._changes.changing(tenant, name, condition) as change:
            connection, task, own = change.connection, change.task, self._changes.own(tenant, name)
            number = own.version(version).number
            own.check_alias(alias, expected)
            queries.point(connection, task, alias, number, by)
            audit.write(connection, by, tenant, "point", name, alias=alias, version=number)
        return change.done[0]

    def rollback(
        self,
        tenant: str,
        name: str,
        alias: str,
        *,
        by: str,
        expected: str | None = None,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Point an alias to its previous version; a second rollback undoes the first.

        Args:
            tenant: tenant that has the task.
            name: name of the task.
            alias: alias to change.
            by: id of the key that makes the change.
            expected: number of the version that the alias must point to now; None: any.
            condition: condition that the task has to meet.

        Raises:
            NotFound: the tenant has no such task.
            Conflict: the alias has no previous version, that version was deleted, or the alias does not point to
                `expected`.
            PreconditionFailed: the condition is false.
        """
        with self._changes.changing(tenant, name, condition) as change:
            connection, task, own = change.connection, change.task, self._changes.own(tenant, name)
            own.check_alias(alias, expected)
            number = own.previous.get(alias)
            if number is None or number not in own.versions:
                raise Conflict(
                    f"roll back alias {alias[:128]!r} of task {name!r}",
                    expected="a version that it stood for before",
                    got="none" if number is None else f"version {number}, which was deleted",
                )
            queries.point(connection, task, alias, number, by)
            audit.write(connection, by, tenant, "roll back", name, alias=alias, version=number)
        return change.done[0]

    def history(self, tenant: str, name: str, alias: str, limit: int = 100) -> list[AliasRecord]:
        """List the versions that an alias pointed to, newest first.

        Raises:
            NotFound: the tenant has no such task, or the task no such alias.
        """
        if alias not in self._changes.own(tenant, name).aliases:
            raise NotFound(f"find alias {alias[:128]!r} of task {name!r}", problem="there is none of that name")
        with self._database.reading() as connection:
            return queries.history(connection, tenant, name, alias, limit)

    def remove(self, tenant: str, name: str, *, by: str, condition: Condition = ALWAYS) -> list[VersionRecord]:
        """Delete a task and return its versions; their numbers are not reused.

        Raises:
            NotFound: the tenant has no such task.
            PreconditionFailed: the condition is false.
        """
        with self._changes.changing(tenant, name, condition) as change:
            connection, task = change.connection, change.task
            gone = list(self._changes.own(tenant, name).versions.values())
            queries.drop_task(connection, task)
            placements.drop(connection, tenant, name)
            numbers = sorted(version.number for version in gone)
            audit.write(connection, by, tenant, "delete", name, versions=numbers)
        self._placed.refresh()
        self._blobs.release(version.digest for version in gone)
        return gone

    def remove_version(
        self, tenant: str, name: str, number: int, *, by: str, condition: Condition = ALWAYS
    ) -> tuple[VersionRecord, TaskRecord]:
        """Delete a version that no alias points to, and return its record and the task afterwards.

        Raises:
            NotFound: the tenant has no such task or version.
            Conflict: an alias points to the version.
            PreconditionFailed: the condition is false.
        """
        with self._changes.changing(tenant, name, condition) as change:
            connection, task, own = change.connection, change.task, self._changes.own(tenant, name)
            record = own.version(str(number))
            using = sorted(alias for alias, current in own.aliases.items() if current == number)
            if using:
                raise Conflict(
                    f"delete version {number} of task {name!r}",
                    expected="one that no alias stands for",
                    got=f"what {', '.join(using)} stands for",
                    fix="Point the alias elsewhere first.",
                )
            queries.drop_version(connection, task, number)
            placements.drop(connection, tenant, name, str(number))
            audit.write(connection, by, tenant, "delete version", name, version=number)
        self._placed.refresh()
        self._blobs.release([record.digest])
        return record, change.done[0]

    def publish(
        self,
        tenant: str,
        name: str,
        announce: Callable[[TaskRecord], None],
        *,
        by: str,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Share a tenant's task with all tenants; its versions keep their numbers.

        Args:
            tenant: tenant that has the task.
            name: name of the task.
            announce: function called with the shared task before it is visible.
            by: id of the key that makes the change.
            condition: condition that the tenant's task has to meet.

        Raises:
            NotFound: the tenant has no such task.
            Conflict: another tenant has a task of that name, or it was shared before and deleted.
            PreconditionFailed: the condition is false.
        """
        with self._changes.changing(tenant, name, condition, announce) as change:
            connection, task = change.connection, change.task
            others = [owner for owner in self.snapshot().owners(name) if owner != tenant]
            if others or queries.row(connection, SHARED, name) is not None:
                raise Conflict(
                    f"publish task {name!r}", expected="a name that no other tenant has", got="one that is in use"
                )
            queries.move(connection, task, SHARED)
            placements.drop(connection, tenant, name)
            audit.write(connection, by, tenant, "publish", name)
        self._placed.refresh()
        return change.done[0]

    def read(self, record: VersionRecord) -> Adapter:
        """Read the adapter of a version.

        Raises:
            IntegrityError: the file is missing or was altered.
        """
        source = f"version {record.number} of task {record.task!r}"
        return canonical.from_bytes(self._blobs.read(record.digest, of=source), source=source)

    def usage(self, tenant: str) -> tuple[int, int]:
        """Return the number of a tenant's versions, and their bytes."""
        sizes = [version.bytes for task in self.snapshot().owned(tenant) for version in task.versions.values()]
        return len(sizes), sum(sizes)

    def sweep(self, *, grace: float = _GRACE) -> int:
        """Remove files of adapters that were deleted at least `grace` seconds ago, and return their number."""
        return self._blobs.sweep(self._referred, grace=grace)

    @contextmanager
    def _referred(self) -> Iterator[Set[str]]:
        """Return the digests of all versions; no server registers one before the block ends."""
        with self._changes.held(shared=self._shared) as snapshot:
            yield {version.digest for version in snapshot.versions()}

    def _add(self, record: VersionRecord, alias: str, condition: Condition) -> None:
        tenant, name = record.tenant, record.task
        with self._changes.writing() as change:
            connection = change.connection
            self.snapshot().check_owner(tenant, name)
            condition.check(name, self.snapshot().own(tenant, name))
            check_room(connection, tenant, self._quota(tenant), record.bytes)
            if tenant != SHARED:
                ensure(self._database, connection, tenant)
            task = queries.add_version(connection, record)
            change.touched.append(task)
            queries.point(connection, task, alias, record.number, record.by)
            audit.write(
                connection, record.by, tenant, "register", name,
                version=record.number, digest=record.digest, alias=alias,
            )  # fmt: skip

    def _next_number(self, tenant: str, name: str, size: int, condition: Condition) -> int:
        """Return the number of the next version; of several servers, only one gets it."""
        if condition != ALWAYS:
            with self._changes.held(shared=self._shared) as snapshot:
                condition.check(name, snapshot.own(tenant, name))
        if not self._shared:
            with self._database.reading() as connection:
                check_room(connection, tenant, self._quota(tenant), size)
                return queries.next_number(connection, tenant, name)
        with self._database.writing() as connection:
            check_room(connection, tenant, self._quota(tenant), size)
            return queries.reserve_number(connection, tenant, name)

    def _return_number(self, record: VersionRecord) -> None:
        with suppress(ServerError), self._database.writing() as connection:  # a number that is lost is only a gap
            queries.return_number(connection, record.tenant, record.task, record.number)
