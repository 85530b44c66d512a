"""Tasks and their versions: each change is one transaction, and is seen by requests once it is durable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, delete, func, insert, select, update

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import Conflict, NotFound, ProtocolError, QuotaExceeded
from tpeft_deploy.formats import canonical
from tpeft_deploy.manifest import is_name
from tpeft_deploy.runtime.server.access import SHARED
from tpeft_deploy.runtime.server.quotas import Quota
from tpeft_deploy.runtime.server.registry import audit, database
from tpeft_deploy.runtime.server.registry.blobs import Blobs
from tpeft_deploy.runtime.server.registry.catalog import CURRENT, Catalog, TaskRecord, VersionRecord
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.staged import Staged, staging
from tpeft_deploy.runtime.server.registry.tenants import ensure

__all__ = ["Check", "Tasks"]

Check = Callable[[VersionRecord, Adapter], None]
"""Refuses an adapter that is not fit to serve, by raising."""

_T, _V, _A = database.tasks, database.versions, database.aliases
_GRACE = 600.0  # seconds for which a deleted adapter's file stays: requests in flight may still read it


class Tasks:
    """What is registered.  Changes block, one after the other; `snapshot` never does.

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
        self._lock = threading.Lock()  # of changes: the snapshot follows the database in their order
        with database.reading() as connection:
            self._catalog = _read(connection)
        self._blobs.sweep({version.digest for version in self._catalog.versions()})

    def snapshot(self) -> Catalog:
        """What is registered now."""
        return self._catalog

    def staging(self, limit: int) -> AbstractAsyncContextManager[Staged]:
        """A place for an upload of so many bytes; what is in it goes when the block ends."""
        return staging(self._incoming, limit)

    def add(
        self, tenant: str, name: str, adapter: Adapter, check: Check, *, by: str, alias: str = CURRENT
    ) -> VersionRecord:
        """Register a version and let an alias stand for it.

        Args:
            tenant: whose task; `SHARED` for everybody's.
            name: of the task, made where there is none.
            adapter: its content.
            check: called before anybody can see it, when its file is durable already.
            by: id of the key that does it.
            alias: what is to stand for it.

        Raises:
            ProtocolError: a name that is not allowed.
            Conflict: the name is another's: shared, or, for a shared task, a tenant's.
            QuotaExceeded: the tenant has as many adapters, or bytes, as it may.
        """
        _check_names(name, alias)
        data = adapter.to_bytes()
        with self._lock:
            self._check_owner(tenant, name)
            digest = self._blobs.write(data)
            with self._database.writing() as connection:
                task, number = _next(connection, tenant, name)
                record = VersionRecord(tenant, name, number, digest, len(data), time.time(), by)
                self._check_quota(connection, tenant, len(data))
            # Not within the transaction: a probe takes long, and other processes make keys meanwhile.
            check(record, adapter)
            with self._database.writing() as connection:
                task, _ = _next(connection, tenant, name, taken=number)
                connection.execute(
                    insert(_V).values(
                        task=task, number=number, digest=digest, bytes=len(data), created=record.created, by=by
                    )
                )
                _point(connection, task, alias, number)
                audit.write(connection, by, tenant, "register", name, version=number, digest=digest, alias=alias)
                found = _task(connection, tenant, name)
            self._catalog = self._catalog.replaced(tenant, name, found)
        return record

    def point(self, tenant: str, name: str, alias: str, version: str, *, by: str) -> TaskRecord:
        """Let an alias stand for a version, given by number or by another alias.

        Raises:
            ProtocolError: a name that is not allowed.
            NotFound: the tenant has no such task or version of its own.
        """
        _check_names(name, alias)
        with self._lock:
            number = self._own(tenant, name).version(version).number
            return self._change(
                tenant, name, by, "point", lambda connection, task: _point(connection, task, alias, number),
                alias=alias, version=number,
            )  # fmt: skip

    def rollback(self, tenant: str, name: str, alias: str, *, by: str) -> TaskRecord:
        """Let an alias stand again for what it stood for before; a second time undoes that.

        Raises:
            NotFound: the tenant has no such task of its own.
            Conflict: the alias stood for nothing before, or that version was deleted.
        """
        with self._lock:
            own = self._own(tenant, name)
            number = own.previous.get(alias)
            if number is None or number not in own.versions:
                raise Conflict(
                    f"roll back alias {alias!r} of task {name!r}",
                    expected="a version that it stood for before",
                    got="none" if number is None else f"version {number}, which was deleted",
                )
            return self._change(
                tenant, name, by, "roll back", lambda connection, task: _point(connection, task, alias, number),
                alias=alias, version=number,
            )  # fmt: skip

    def remove(self, tenant: str, name: str, *, by: str) -> list[VersionRecord]:
        """Delete a task with all its versions, which are returned; the numbers are never given again.

        Raises:
            NotFound: the tenant has no such task of its own.
        """
        with self._lock:
            own = self._own(tenant, name)

            def gone(connection: Connection, task: int) -> None:
                connection.execute(delete(_A).where(_A.c.task == task))
                connection.execute(delete(_V).where(_V.c.task == task))
                connection.execute(update(_T).where(_T.c.id == task).values(deleted=True))

            self._change(tenant, name, by, "delete", gone, versions=sorted(own.versions))
            return list(own.versions.values())

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
            chosen = (_V.c.number == number,)
            self._change(
                tenant, name, by, "delete version",
                lambda connection, task: connection.execute(delete(_V).where(_V.c.task == task, *chosen)),
                version=number,
            )  # fmt: skip
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
                if others or _row(connection, SHARED, name) is not None:
                    raise Conflict(
                        f"publish task {name!r}", expected="a name that nobody else has", got="one that others know"
                    )
                ensure(connection, SHARED)
                own = (_T.c.tenant == tenant) & (_T.c.name == name)
                connection.execute(update(_T).where(own).values(tenant=SHARED))
                audit.write(connection, by, tenant, "publish", name)
                published = _found(_task(connection, SHARED, name), name)
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
        own = [version for version in self._catalog.versions() if version.tenant == tenant]
        return len(own), sum(version.bytes for version in own)

    def sweep(self) -> int:
        """Remove the files of adapters deleted some time ago; how many there were."""
        with self._lock:
            return self._blobs.sweep({version.digest for version in self._catalog.versions()}, older_than=_GRACE)

    def _own(self, tenant: str, name: str) -> TaskRecord:
        return _found(self._catalog.own(tenant, name), name)

    def _change(
        self,
        tenant: str,
        name: str,
        by: str,
        action: str,
        change: Callable[[Connection, int], Any],
        **detail: Any,
    ) -> TaskRecord:
        before = self._own(tenant, name)
        with self._database.writing() as connection:
            row = _row(connection, tenant, name)
            if row is None:
                raise NotFound(f"{action} task {name!r}", problem="it was deleted meanwhile")
            change(connection, row["id"])
            audit.write(connection, by, tenant, action, name, **detail)
            found = _task(connection, tenant, name)
        self._catalog = self._catalog.replaced(tenant, name, found)
        return found or before

    def _check_owner(self, tenant: str, name: str) -> None:
        others = [owner for owner in self._catalog.owners(name) if owner != tenant]
        if others and (tenant == SHARED or SHARED in others):
            raise Conflict(
                f"register task {name!r}",
                expected="a name of its own",
                got="the name of a shared task" if tenant != SHARED else "one that tenants have",
            )

    def _check_quota(self, connection: Connection, tenant: str, size: int) -> None:
        quota = self._quota(tenant)
        if quota.adapters is None and quota.bytes is None:
            return
        own = select(func.count(), func.coalesce(func.sum(_V.c.bytes), 0)).join(_T, _T.c.id == _V.c.task)
        count, total = connection.execute(own.where(_T.c.tenant == tenant)).one()
        for what, limit, would in (("adapters", quota.adapters, count + 1), ("bytes", quota.bytes, total + size)):
            if limit is not None and would > limit:
                raise QuotaExceeded(
                    f"register an adapter of tenant {tenant!r}",
                    expected=f"at most {limit:,} {what}",
                    got=f"{would:,} with this one",
                    fix="Delete versions that are not needed, or ask for a larger quota.",
                )


def _check_names(name: str, alias: str) -> None:
    for what, given in (("task", name), ("alias", alias)):
        if not is_name(given) or (what == "alias" and given.isdigit()):
            raise ProtocolError(
                f"name a {what}",
                expected="1 to 128 letters, digits, '.', '_', ':' or '-', starting with a letter or digit"
                + (", and not a number" if what == "alias" else ""),
                got=repr(given),
            )


def _found(task: TaskRecord | None, name: str) -> TaskRecord:
    if task is None:
        raise NotFound(f"find task {name!r}", problem="there is none of that name that is the tenant's own")
    return task


def _row(connection: Connection, tenant: str, name: str) -> Mapping[str, Any] | None:
    # Locked where the database has such locks; SQLite's writers wait for each other anyway.
    own = select(_T).where(_T.c.tenant == tenant, _T.c.name == name).with_for_update()
    return cast("Mapping[str, Any] | None", connection.execute(own).mappings().one_or_none())


def _next(connection: Connection, tenant: str, name: str, *, taken: int | None = None) -> tuple[int, int]:
    """The task's id, made where there is none, and its next version's number, taken if it is given."""
    ensure(connection, tenant)
    row = _row(connection, tenant, name)
    if row is None:
        if taken is None:
            return 0, 1
        connection.execute(insert(_T).values(tenant=tenant, name=name, next_number=taken, deleted=False))
        row = _row(connection, tenant, name)
    if row is None:
        raise RuntimeError("a row that was written just now is not there")
    if taken is not None:
        connection.execute(update(_T).where(_T.c.id == row["id"]).values(next_number=taken + 1, deleted=False))
    return row["id"], row["next_number"]


def _point(connection: Connection, task: int, alias: str, number: int) -> None:
    own = (_A.c.task == task) & (_A.c.alias == alias)
    old = connection.scalar(select(_A.c.number).where(own))
    if old is None:
        connection.execute(insert(_A).values(task=task, alias=alias, number=number, previous=None))
    elif old != number:
        connection.execute(update(_A).where(own).values(number=number, previous=old))


def _task(connection: Connection, tenant: str, name: str) -> TaskRecord | None:
    return _read(connection, (_T.c.tenant == tenant) & (_T.c.name == name)).own(tenant, name)


def _read(connection: Connection, which: Any = None) -> Catalog:
    condition = _T.c.deleted.is_(False) if which is None else which & _T.c.deleted.is_(False)
    owners = {row.id: (row.tenant, row.name) for row in connection.execute(select(_T).where(condition))}
    versions: dict[int, dict[int, VersionRecord]] = {task: {} for task in owners}
    aliases: dict[int, dict[str, int]] = {task: {} for task in owners}
    previous: dict[int, dict[str, int]] = {task: {} for task in owners}
    for row in connection.execute(select(_V).join(_T, _T.c.id == _V.c.task).where(condition)):
        tenant, name = owners[row.task]
        versions[row.task][row.number] = VersionRecord(
            tenant, name, row.number, row.digest, row.bytes, row.created, row.by
        )
    for row in connection.execute(select(_A).join(_T, _T.c.id == _A.c.task).where(condition)):
        aliases[row.task][row.alias] = row.number
        if row.previous is not None:
            previous[row.task][row.alias] = row.previous
    tasks: dict[str, dict[str, TaskRecord]] = {}
    for task, (tenant, name) in owners.items():
        record = TaskRecord(tenant, name, versions[task], aliases[task], previous[task])
        tasks.setdefault(tenant, {})[name] = record
    return Catalog(tasks)
