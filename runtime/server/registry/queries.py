"""Queries of tasks, versions and aliases, as parts of a transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from tpeft_deploy.runtime.server.registry import schema
from tpeft_deploy.runtime.server.registry.snapshot import AliasRecord, TaskRecord, VersionRecord

__all__ = [
    "StoredTask",
    "add_version",
    "any_version",
    "changed_since",
    "drop_task",
    "drop_version",
    "history",
    "move",
    "next_number",
    "point",
    "reserve_number",
    "return_number",
    "row",
    "stored",
    "touch",
    "usage",
]

_T, _V, _A, _H = schema.tasks, schema.versions, schema.aliases, schema.history
_KEPT = 100  # changes in the history of one alias


class StoredTask(NamedTuple):
    """A task as it is stored: its id, where it is found, and what it is; None if it was deleted."""

    id: int
    tenant: str
    name: str
    record: TaskRecord | None


def row(connection: Connection, tenant: str, name: str) -> Mapping[str, Any] | None:
    """Return the row of a task, deleted or not, locked where the database supports it."""
    own = select(_T).where(_T.c.tenant == tenant, _T.c.name == name).with_for_update()
    return cast("Mapping[str, Any] | None", connection.execute(own).mappings().one_or_none())


def next_number(connection: Connection, tenant: str, name: str) -> int:
    """Return the number of a task's next version."""
    found = connection.scalar(select(_T.c.next_number).where(_T.c.tenant == tenant, _T.c.name == name))
    return found or 1


def reserve_number(connection: Connection, tenant: str, name: str) -> int:
    """Return the number of a task's next version, and give it to nobody else."""
    found = row(connection, tenant, name)
    if found is None:
        connection.execute(insert(_T).values(tenant=tenant, name=name, next_number=2, deleted=True))
        return 1
    number = int(found["next_number"])
    connection.execute(update(_T).where(_T.c.id == found["id"]).values(next_number=number + 1))
    return number


def return_number(connection: Connection, tenant: str, name: str, number: int) -> None:
    """Make a reserved number the next one again, unless a later one was given since."""
    own = (_T.c.tenant == tenant) & (_T.c.name == name) & (_T.c.next_number == number + 1)
    connection.execute(update(_T).where(own).values(next_number=number))


def add_version(connection: Connection, record: VersionRecord) -> int:
    """Insert a version, and its task when there is none; return the task's id."""
    number = record.number
    found = row(connection, record.tenant, record.task)
    if found is None:
        made = insert(_T).values(tenant=record.tenant, name=record.task, next_number=number + 1, deleted=False)
        task: int = connection.execute(made.returning(_T.c.id)).scalar_one()
    else:
        task = found["id"]
        following = max(found["next_number"], number + 1)
        connection.execute(update(_T).where(_T.c.id == task).values(next_number=following, deleted=False))
    connection.execute(
        insert(_V).values(
            task=task, number=number, digest=record.digest, bytes=record.bytes, created=record.created, by=record.by
        )
    )
    return task


def drop_task(connection: Connection, task: int) -> None:
    """Delete a task's versions and aliases; its row stays, so that no version number is reused."""
    connection.execute(delete(_A).where(_A.c.task == task))
    connection.execute(delete(_H).where(_H.c.task == task))
    connection.execute(delete(_V).where(_V.c.task == task))
    connection.execute(update(_T).where(_T.c.id == task).values(deleted=True))


def drop_version(connection: Connection, task: int, number: int) -> None:
    """Delete one version."""
    connection.execute(delete(_V).where(_V.c.task == task, _V.c.number == number))


def move(connection: Connection, task: int, tenant: str) -> None:
    """Move a task to another tenant."""
    connection.execute(update(_T).where(_T.c.id == task).values(tenant=tenant))


def point(connection: Connection, task: int, alias: str, number: int, by: str) -> None:
    """Point an alias to a version, and add the change to its history."""
    own = (_A.c.task == task) & (_A.c.alias == alias)
    old = connection.scalar(select(_A.c.number).where(own))
    if old is None:
        connection.execute(insert(_A).values(task=task, alias=alias, number=number, previous=None))
    elif old != number:
        connection.execute(update(_A).where(own).values(number=number, previous=old))
    if old == number:
        return
    of = (_H.c.task == task) & (_H.c.alias == alias)
    last = connection.scalar(select(_H.c.number).where(of).order_by(_H.c.id.desc()).limit(1))
    if old is not None and last != old:  # changed by a server without histories
        connection.execute(insert(_H).values(task=task, alias=alias, number=old))
    connection.execute(insert(_H).values(task=task, alias=alias, number=number, time=time.time(), by=by))
    oldest = connection.scalar(select(_H.c.id).where(of).order_by(_H.c.id.desc()).offset(_KEPT).limit(1))
    if oldest is not None:
        connection.execute(delete(_H).where(of, _H.c.id <= oldest))


def history(connection: Connection, tenant: str, name: str, alias: str, limit: int) -> list[AliasRecord]:
    """List the versions that an alias pointed to, newest first."""
    of = (_T.c.tenant == tenant) & (_T.c.name == name)
    now = connection.scalar(select(_A.c.number).join(_T, _T.c.id == _A.c.task).where(of, _A.c.alias == alias))
    columns = select(_H.c.number, _H.c.time, _H.c.by).join(_T, _T.c.id == _H.c.task)
    wanted = columns.where(of, _H.c.alias == alias).order_by(_H.c.id.desc()).limit(limit)
    found = [AliasRecord(*row) for row in connection.execute(wanted)]
    if now is not None and (not found or found[0].number != now):
        found.insert(0, AliasRecord(now, None, None))
    return found[:limit]


def usage(connection: Connection, tenant: str) -> tuple[int, int]:
    """Return the number of a tenant's versions, and their bytes."""
    own = select(func.count(), func.coalesce(func.sum(_V.c.bytes), 0)).join(_T, _T.c.id == _V.c.task)
    count, total = connection.execute(own.where(_T.c.tenant == tenant)).one()
    return int(count), int(total)


def any_version(connection: Connection) -> bool:
    """Whether any version is registered."""
    return connection.execute(select(_V.c.number).limit(1)).first() is not None


def changed_since(connection: Connection, number: int) -> list[StoredTask]:
    """Return the tasks that were changed, deleted ones too, since a change counter had a value."""
    return _stored(connection, _T.c.changed > number)


def touch(connection: Connection, task: int, number: int) -> None:
    """Set the number of a task's last change."""
    connection.execute(update(_T).where(_T.c.id == task).values(changed=number))


def stored(connection: Connection) -> list[StoredTask]:
    """Return all tasks."""
    return _stored(connection, _T.c.deleted.is_(False))


def _stored(connection: Connection, condition: ColumnElement[bool]) -> list[StoredTask]:
    columns = _T.c.id, _T.c.tenant, _T.c.name, _T.c.deleted, _T.c.changed
    found = list(connection.execute(select(*columns).where(condition)))
    owners = {row.id: (row.tenant, row.name) for row in found}
    versions: dict[int, dict[int, VersionRecord]] = {task: {} for task in owners}
    aliases: dict[int, dict[str, int]] = {task: {} for task in owners}
    previous: dict[int, dict[str, int]] = {task: {} for task in owners}
    wanted = select(_V).join(_T, _T.c.id == _V.c.task).where(condition).order_by(_V.c.task, _V.c.number)
    for task, number, *rest in connection.execute(wanted):
        versions[task][number] = VersionRecord(*owners[task], number, *rest)
    for task, alias, number, before in connection.execute(
        select(_A).join(_T, _T.c.id == _A.c.task).where(condition).order_by(_A.c.task, _A.c.alias)
    ):
        aliases[task][alias] = number
        if before is not None:
            previous[task][alias] = before
    return [
        StoredTask(
            row.id,
            row.tenant,
            row.name,
            None
            if row.deleted
            else TaskRecord(row.tenant, row.name, versions[row.id], aliases[row.id], previous[row.id], row.changed),
        )
        for row in found
    ]
