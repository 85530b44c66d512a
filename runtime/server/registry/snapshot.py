"""What is registered at one moment; never changes, so that requests read it without waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tpeft_deploy.errors import NotFound
from tpeft_deploy.runtime.server.tenancy.access import SHARED

__all__ = ["CURRENT", "AliasRecord", "Catalog", "TaskRecord", "VersionRecord"]

CURRENT = "current"
"""The alias that a request without version gets."""


@dataclass(frozen=True)
class VersionRecord:
    """One version of a task: its content never changes, and its number is never given again.

    Attributes:
        tenant: whose task it is; empty: everybody's.
        task: its name.
        number: from 1.
        digest: SHA-256 of the canonical adapter.
        bytes: of it.
        created: seconds since 1970.
        by: id of the key that registered it.
    """

    tenant: str
    task: str
    number: int
    digest: str
    bytes: int
    created: float
    by: str
    key: str = field(init=False)
    """The runtime's name of it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.tenant}/{self.task}@{self.number}")


@dataclass(frozen=True)
class AliasRecord:
    """What an alias stood for from some time on.

    Attributes:
        number: of the version.
        time: seconds since 1970; None where it was not recorded.
        by: id of the key that did it, likewise.
    """

    number: int
    time: float | None
    by: str | None


@dataclass(frozen=True)
class TaskRecord:
    """A task: its versions by number, and what its aliases stand for, now and before."""

    tenant: str
    name: str
    versions: Mapping[int, VersionRecord]
    aliases: Mapping[str, int]
    previous: Mapping[str, int]

    def version(self, wanted: str) -> VersionRecord:
        """The version of a number or alias; empty: the current one.

        Raises:
            NotFound: there is none.
        """
        number = self.aliases.get(wanted or CURRENT)
        if number is None and wanted.isascii() and wanted.isdigit() and len(wanted) < 10:
            number = int(wanted)
        found = None if number is None else self.versions.get(number)
        if found is None:
            known = [*sorted(self.aliases), *map(str, sorted(self.versions))]
            raise NotFound(
                f"find version {wanted or CURRENT!r} of task {self.name!r}",
                expected=f"one of {', '.join(known[:20]) or 'none, as it has no version'}",
                got="another",
            )
        return found


class Catalog:
    """All tasks.

    Args:
        tasks: by tenant and name.
    """

    def __init__(self, tasks: Mapping[str, Mapping[str, TaskRecord]]) -> None:
        self._tasks = tasks

    def find(self, tenant: str, name: str, version: str = "") -> VersionRecord:
        """The version that a tenant means: of its own task, else of the shared one.

        Raises:
            NotFound: there is none that it may see.
        """
        return self.task(tenant, name).version(version)

    def task(self, tenant: str, name: str) -> TaskRecord:
        """The task that a tenant means: its own, else the shared one.

        Raises:
            NotFound: there is none that it may see.
        """
        found = self.own(tenant, name) or self.own(SHARED, name)
        if found is None:
            raise NotFound(
                f"find model {name!r}", problem="there is none of that name", fix="GET /v2/registry/tasks lists them."
            )
        return found

    def own(self, tenant: str, name: str) -> TaskRecord | None:
        """A tenant's own task."""
        tasks = self._tasks.get(tenant)
        return None if tasks is None else tasks.get(name)

    def owned(self, tenant: str) -> Iterable[TaskRecord]:
        """A tenant's own tasks."""
        return self._tasks.get(tenant, {}).values()

    def visible(self, tenant: str | None) -> list[TaskRecord]:
        """A tenant's own tasks and the shared ones, by name; all there are for None."""
        owners: Iterable[str] = self._tasks if tenant is None else dict.fromkeys((tenant, SHARED))
        found = [task for owner in owners for task in self.owned(owner)]
        return sorted(found, key=lambda task: (task.name, task.tenant))

    def owners(self, name: str) -> list[str]:
        """The tenants that have a task of a name."""
        return [tenant for tenant, tasks in self._tasks.items() if name in tasks]

    def versions(self) -> Iterable[VersionRecord]:
        """All versions of all tasks."""
        for tasks in self._tasks.values():
            for task in tasks.values():
                yield from task.versions.values()

    def replaced(self, tenant: str, name: str, task: TaskRecord | None) -> Catalog:
        """The same with one task as it is now, or without it."""
        own = {other: record for other, record in self._tasks.get(tenant, {}).items() if other != name}
        if task is not None:
            own[name] = task
        return Catalog({**self._tasks, tenant: own})
