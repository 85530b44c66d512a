"""Tasks and their versions: each change is one transaction, and is seen by requests once it is durable."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import Conflict, NotFound, QuotaExceeded
from tpeft_deploy.formats import canonical
from tpeft_deploy.runtime.server.registry import audit, placements, queries
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.registry.files.locks import KeyedLocks
from tpeft_deploy.runtime.server.registry.files.uploads import Run, Staged, staging
from tpeft_deploy.runtime.server.registry.names import check_alias, check_task, check_tenant
from tpeft_deploy.runtime.server.registry.snapshot import CURRENT, AliasRecord, Catalog, TaskRecord, VersionRecord
from tpeft_deploy.runtime.server.registry.tenants import ensure
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["Check", "Tasks"]

Check = Callable[[VersionRecord, Adapter], None]
"""Refuses an adapter that is not fit to serve, by raising."""

_GRACE = 600.0  # seconds for which a deleted adapter's file stays: requests in flight may still read it


class Tasks:
    """What is registered.  Changes block; `snapshot` never does.

    Args:
        database: where it is.
        blobs: the adapters themselves.
        incoming: where uploads are staged.
        quota: a tenant's quota.
    """

    def __init__(self, database: Database, blobs: Blobs, incoming: Path, quota: Callable[[str], Quota]) -> None:
        self._database = database
        self._blobs = blobs
        self._incoming = incoming
        self._quota = quota
        # Taken first: versions of one task are numbered in their order, and a probe holds up no other task.
        self._turns = KeyedLocks()
        self._lock = threading.Lock()  # of changes, each short: the snapshot follows the database in their order
        with database.reading() as connection:
            self._catalog = queries.catalog(connection)
        blobs.sweep({version.digest for version in self._catalog.versions()}, grace=0)

    def snapshot(self) -> Catalog:
        """What is registered now."""
        return self._catalog

    def staging(self, limit: int, run: Run = asyncio.to_thread) -> AbstractAsyncContextManager[Staged]:
        """A place for an upload of so many bytes; what is in it goes when the block ends.

        Args:
            limit: bytes of all its files.
            run: calls what blocks in a thread.
        """
        return staging(self._incoming, limit, run)

    def add(
        self,
        tenant: str,
        name: str,
        adapter: Adapter,
        check: Check,
        *,
        by: str,
        alias: str = CURRENT,
        data: bytes | None = None,
    ) -> VersionRecord:
        """Register a version and let an alias stand for it.

        Args:
            tenant: whose task; `SHARED` for everybody's.
            name: of the task, made where there is none.
            adapter: its content.
            check: called before anybody can see it, when its file is durable already; may take its time.
            by: id of the key that does it.
            alias: what is to stand for it.
            data: the adapter's canonical file, where it is there already.

        Raises:
            ProtocolError: a name that is not allowed.
            Conflict: the name is another's: shared, or, for a shared task, a tenant's.
            QuotaExceeded: the tenant has as many adapters, or bytes, as it may.
        """
        check_task(name)
        check_alias(alias)
        if tenant != SHARED:
            check_tenant(tenant)
        data = adapter.to_bytes() if data is None else data
        with self._turns.hold((tenant, name)):
            # Refused before it is written or run, where that is known already; decided in the transaction below.
            self._check_owner(tenant, name)
            with self._database.reading() as connection:
                number = queries.next_number(connection, tenant, name)
                self._check_quota(connection, tenant, len(data))
            try:
                with self._blobs.coming(data) as digest:
                    record = VersionRecord(tenant, name, number, digest, len(data), time.time(), by)
                    check(record, adapter)
                    self._add(record, alias)
            except BaseException:
                # Not left to a sweep: until then, refused uploads would fill the disk.
                self._discard(Blobs.digest(data))
                raise
        return record

    def point(
        self, tenant: str, name: str, alias: str, version: str, *, by: str, expected: str | None = None
    ) -> TaskRecord:
        """Let an alias stand for a version, given by number or by another alias.

        Args:
            tenant: tenant that has the task.
            name: name of the task.
            alias: alias that changes.
            version: number or alias of what it is to stand for.
            by: id of the key that does it.
            expected: number of the version that it has to stand for now; None for any.

        Raises:
            ProtocolError: a name that is not allowed.
            NotFound: the tenant has no such task or version of its own.
            Conflict: the alias stands for another version than expected.
        """
        check_task(name)
        check_alias(alias)
        with self._lock:
            own = self._own(tenant, name)
            number = own.version(version).number
            _check_expected(own, alias, expected)
            return self._point(tenant, name, alias, number, by, "point")

    def rollback(self, tenant: str, name: str, alias: str, *, by: str, expected: str | None = None) -> TaskRecord:
        """Let an alias stand again for what it stood for before; a second time undoes that.

        Args:
            tenant: tenant that has the task.
            name: name of the task.
            alias: alias that changes.
            by: id of the key that does it.
            expected: number of the version that it has to stand for now; None for any.

        Raises:
            NotFound: the tenant has no such task of its own.
            Conflict: the alias stood for nothing before, that version was deleted, or it stands for another version
                than expected.
        """
        with self._lock:
            own = self._own(tenant, name)
            _check_expected(own, alias, expected)
            number = own.previous.get(alias)
            if number is None or number not in own.versions:
                raise Conflict(
                    f"roll back alias {alias[:128]!r} of task {name!r}",
                    expected="a version that it stood for before",
                    got="none" if number is None else f"version {number}, which was deleted",
                )
            return self._point(tenant, name, alias, number, by, "roll back")

    def history(self, tenant: str, name: str, alias: str, limit: int = 100) -> list[AliasRecord]:
        """What an alias stands for and stood for before, the newest first.

        Raises:
            NotFound: the tenant has no such task of its own, or the task no such alias.
        """
        if alias not in self._own(tenant, name).aliases:
            raise NotFound(f"find alias {alias[:128]!r} of task {name!r}", problem="there is none of that name")
        with self._database.reading() as connection:
            return queries.history(connection, tenant, name, alias, limit)

    def remove(self, tenant: str, name: str, *, by: str) -> list[VersionRecord]:
        """Delete a task with all its versions, which are returned; the numbers are never given again.

        Raises:
            NotFound: the tenant has no such task of its own.
        """
        with self._lock:
            gone = list(self._own(tenant, name).versions.values())
            with self._changing(tenant, name) as (connection, task):
                queries.drop_task(connection, task)
                placements.drop(connection, tenant, name)
                numbers = sorted(version.number for version in gone)
                audit.write(connection, by, tenant, "delete", name, versions=numbers)
            self._blobs.free(version.digest for version in gone)
            return gone

    def remove_version(self, tenant: str, name: str, number: int, *, by: str) -> VersionRecord:
        """Delete a version that no alias stands for.

        Raises:
            NotFound: the tenant has no such task or version of its own.
            Conflict: an alias stands for it.
        """
        with self._lock:
            own = self._own(tenant, name)
            record = own.version(str(number))
            using = sorted(alias for alias, current in own.aliases.items() if current == number)
            if using:
                raise Conflict(
                    f"delete version {number} of task {name!r}",
                    expected="one that no alias stands for",
                    got=f"what {', '.join(using)} stands for",
                    fix="Point the alias elsewhere first.",
                )
            with self._changing(tenant, name) as (connection, task):
                queries.drop_version(connection, task, number)
                placements.drop(connection, tenant, name, str(number))
                audit.write(connection, by, tenant, "delete version", name, version=number)
            self._blobs.free([record.digest])
            return record

    def publish(self, tenant: str, name: str, announce: Callable[[TaskRecord], None], *, by: str) -> TaskRecord:
        """Give a tenant's task to everybody; its versions keep their numbers.

        Args:
            tenant: whose task it is.
            name: of the task.
            announce: called with the task as it will be, before anybody can ask for it.
            by: id of the key that does it.

        Raises:
            NotFound: the tenant has no such task of its own.
            Conflict: another tenant has a task of that name, or it was shared before and deleted.
        """
        with self._lock:
            self._own(tenant, name)
            others = [owner for owner in self._catalog.owners(name) if owner != tenant]
            with self._database.writing() as connection:
                if others or queries.row(connection, SHARED, name) is not None:
                    raise Conflict(
                        f"publish task {name!r}", expected="a name that nobody else has", got="one that others know"
                    )
                queries.move(connection, _id(connection, tenant, name), SHARED)
                placements.drop(connection, tenant, name)
                audit.write(connection, by, tenant, "publish", name)
                published = _found(queries.task(connection, SHARED, name), name)
            announce(published)
            self._catalog = self._catalog.replaced(tenant, name, None).replaced(SHARED, name, published)
        return published

    def read(self, record: VersionRecord) -> Adapter:
        """A version's adapter.

        Raises:
            IntegrityError: its file is missing or was altered.
        """
        source = f"version {record.number} of task {record.task!r}"
        return canonical.from_bytes(self._blobs.read(record.digest, of=source), source=source)

    def usage(self, tenant: str) -> tuple[int, int]:
        """How many versions a tenant has, and their bytes."""
        own = [version for task in self._catalog.owned(tenant) for version in task.versions.values()]
        return len(own), sum(version.bytes for version in own)

    def sweep(self, *, grace: float = _GRACE) -> int:
        """Remove the files of adapters deleted `grace` seconds ago or before; how many there were."""
        with self._lock:
            return self._blobs.sweep({version.digest for version in self._catalog.versions()}, grace=grace)

    def _discard(self, digest: str) -> None:
        with self._lock:
            self._blobs.discard(digest, {version.digest for version in self._catalog.versions()})

    def _add(self, record: VersionRecord, alias: str) -> None:
        tenant, name = record.tenant, record.task
        with self._lock:
            self._check_owner(tenant, name)
            with self._database.writing() as connection:
                self._check_quota(connection, tenant, record.bytes)
                if tenant != SHARED:
                    ensure(self._database, connection, tenant)
                queries.point(connection, queries.add_version(connection, record), alias, record.number, record.by)
                audit.write(
                    connection, record.by, tenant, "register", name,
                    version=record.number, digest=record.digest, alias=alias,
                )  # fmt: skip
                found = queries.task(connection, tenant, name)
            self._catalog = self._catalog.replaced(tenant, name, found)

    def _point(self, tenant: str, name: str, alias: str, number: int, by: str, action: str) -> TaskRecord:
        with self._changing(tenant, name) as (connection, task):
            queries.point(connection, task, alias, number, by)
            audit.write(connection, by, tenant, action, name, alias=alias, version=number)
        return self._own(tenant, name)

    @contextmanager
    def _changing(self, tenant: str, name: str) -> Iterator[tuple[Connection, int]]:
        """A transaction on one task; what it leaves is seen when it is durable."""
        with self._database.writing() as connection:
            yield connection, _id(connection, tenant, name)
            found = queries.task(connection, tenant, name)
        self._catalog = self._catalog.replaced(tenant, name, found)

    def _own(self, tenant: str, name: str) -> TaskRecord:
        return _found(self._catalog.own(tenant, name), name)

    def _check_owner(self, tenant: str, name: str) -> None:
        others = [owner for owner in self._catalog.owners(name) if owner != tenant]
        if others and (tenant == SHARED or SHARED in others):
            raise Conflict(
                f"register task {name!r}",
                expected="a name of its own",
                got="the name of a shared task" if tenant != SHARED else "one that tenants have",
            )

    def _check_quota(self, connection: Connection, tenant: str, size: int) -> None:
        quota = Quota() if tenant == SHARED else self._quota(tenant)  # what is everybody's is the administrators'
        if quota.adapters is None and quota.bytes is None:
            return
        count, total = queries.usage(connection, tenant)
        for what, limit, would in (("adapters", quota.adapters, count + 1), ("bytes", quota.bytes, total + size)):
            if limit is not None and would > limit:
                raise QuotaExceeded(
                    f"register an adapter of tenant {tenant!r}",
                    expected=f"at most {limit:,} {what}",
                    got=f"{would:,} with this one",
                    fix="Delete versions that are not needed, or ask for a larger quota.",
                )


def _found(task: TaskRecord | None, name: str) -> TaskRecord:
    if task is None:
        raise NotFound(f"find task {name[:128]!r}", problem="there is none of that name that is the tenant's own")
    return task


def _check_expected(task: TaskRecord, alias: str, expected: str | None) -> None:
    present = task.aliases.get(alias)
    if expected is not None and expected != str(present):
        raise Conflict(
            f"change alias {alias[:128]!r} of task {task.name!r}",
            expected=f"that it stands for version {expected[:20]!r}",
            got="none" if present is None else f"version {present}",
            fix="It was changed meanwhile: look at it, and try again.",
        )


def _id(connection: Connection, tenant: str, name: str) -> int:
    row = queries.row(connection, tenant, name)
    if row is None:
        raise NotFound(f"find task {name!r}", problem="it was deleted meanwhile")
    return int(row["id"])
