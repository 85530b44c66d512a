"""Immutable snapshot of the registry, which requests read without locks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tpeft_deploy.errors import Conflict, NotFound, PreconditionFailed
from tpeft_deploy.runtime.server.tenancy.access import SHARED

__all__ = ["ALWAYS", "CURRENT", "AliasRecord", "Condition", "RegistrySnapshot", "TaskRecord", "VersionRecord"]

CURRENT = "current"
"""Alias that requests without a version resolve to."""


@dataclass(frozen=True)
class VersionRecord:
    """One version of a task: its content never changes, and its number is never reused.

    Attributes:
        tenant: tenant of the task; empty for a shared task.
        task: name of the task.
        number: version number, from 1.
        digest: SHA-256 of the canonical adapter.
        bytes: size of the canonical adapter.
        created: seconds since 1970.
        by: id of the key that registered the version.
    """

    tenant: str
    task: str
    number: int
    digest: str
    bytes: int
    created: float
    by: str
    key: str = field(init=False)
    """Name of the version in the runtime."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.tenant}/{self.task}@{self.number}")


@dataclass(frozen=True)
class AliasRecord:
    """One entry in the history of an alias.

    Attributes:
        number: version number.
        time: seconds since 1970 of the change; None when it was not recorded.
        by: id of the key that made the change; None when it was not recorded.
    """

    number: int
    time: float | None
    by: str | None


@dataclass(frozen=True)
class TaskRecord:
    """A task: versions by number, and current and previous version numbers by alias.

    Attributes:
        changed: counter of changes of tasks at the last change of this one.
    """

    tenant: str
    name: str
    versions: Mapping[int, VersionRecord]
    aliases: Mapping[str, int]
    previous: Mapping[str, int]
    changed: int = 0

    @property
    def tag(self) -> str:
        """Entity tag: another one after each change of versions or aliases, and never one of an earlier task."""
        return f'"{self.changed}"'

    def version(self, wanted: str) -> VersionRecord:
        """Return the version of a number or alias.

        Args:
            wanted: number or alias; empty: the current version.

        Raises:
            NotFound: there is no such version.
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

    def check_alias(self, alias: str, expected: str | None) -> None:
        """Check which version an alias stands for.

        Args:
            alias: alias of the task.
            expected: number of the version; None: any.

        Raises:
            Conflict: it stands for another one, or for none.
        """
        present = self.aliases.get(alias)
        if expected is not None and expected != str(present):
            raise Conflict(
                f"change alias {alias[:128]!r} of task {self.name!r}",
                expected=f"that it stands for version {expected[:20]!r}",
                got="none" if present is None else f"version {present}",
                fix="It was changed meanwhile: look at it, and try again.",
            )


@dataclass(frozen=True)
class Condition:
    """What must be true of a task when it is changed.

    Attributes:
        tags: entity tags, one of which the task must have; None: any task, or none.
        exists: whether the task must exist; None: either.
    """

    tags: frozenset[str] | None = None
    exists: bool | None = None

    def check(self, name: str, task: TaskRecord | None) -> None:
        """Check the condition in the transaction of a change.

        Args:
            name: name of the task.
            task: the tenant's task; None: it does not exist.

        Raises:
            PreconditionFailed: the condition is false.
        """
        if task is None and (self.exists or self.tags is not None):
            raise self._failed(name, self._expected(), "none", "It was deleted or never made")
        if task is None:
            return
        if self.exists is False:
            raise self._failed(name, "that it does not exist", f"a task with the tag {task.tag}", "It was made already")
        if self.tags is not None and task.tag not in self.tags:
            raise self._failed(name, self._expected(), f"the tag {task.tag}", "It was changed meanwhile")

    def _expected(self) -> str:
        if self.tags is None:
            return "that it exists"
        shown = ", ".join(sorted(self.tags)[:5])
        return f"the tag {shown[:100]}"

    @staticmethod
    def _failed(name: str, expected: str, got: str, reason: str) -> PreconditionFailed:
        fix = f"{reason}: look at it, and decide whether the change is still wanted. Nothing was changed."
        return PreconditionFailed(f"change task {name[:128]!r}", expected=expected, got=got, fix=fix)


ALWAYS = Condition()
"""Condition of a change that has none."""


class RegistrySnapshot:
    """All tasks at one moment.

    Args:
        tasks: tasks by tenant and name.
    """

    def __init__(self, tasks: Mapping[str, Mapping[str, TaskRecord]]) -> None:
        self._tasks = tasks

    def find(self, tenant: str, name: str, version: str = "") -> VersionRecord:
        """Resolve a version for a tenant: of the tenant's task, else of the shared one.

        Raises:
            NotFound: the tenant sees no such task or version.
        """
        return self.task(tenant, name).version(version)

    def task(self, tenant: str, name: str) -> TaskRecord:
        """Resolve a task for a tenant: the tenant's task, else the shared one.

        Raises:
            NotFound: the tenant sees no such task.
        """
        found = self.own(tenant, name) or self.own(SHARED, name)
        if found is None:
            raise NotFound(
                f"find model {name!r}", problem="there is none of that name", fix="GET /v2/registry/tasks lists them."
            )
        return found

    def own(self, tenant: str, name: str) -> TaskRecord | None:
        """Return a tenant's task, without the shared ones; None when there is none."""
        tasks = self._tasks.get(tenant)
        return None if tasks is None else tasks.get(name)

    def owned(self, tenant: str) -> Iterable[TaskRecord]:
        """Return a tenant's tasks, without the shared ones."""
        return self._tasks.get(tenant, {}).values()

    def visible(self, tenant: str | None) -> list[TaskRecord]:
        """Return a tenant's and the shared tasks, sorted by name; all tasks for None."""
        owners: Iterable[str] = self._tasks if tenant is None else dict.fromkeys((tenant, SHARED))
        found = [task for owner in owners for task in self.owned(owner)]
        return sorted(found, key=lambda task: (task.name, task.tenant))

    def owners(self, name: str) -> list[str]:
        """Return the tenants that have a task of a name."""
        return [tenant for tenant, tasks in self._tasks.items() if name in tasks]

    def check_owner(self, tenant: str, name: str) -> None:
        """Check that a tenant may register a task of a name.

        Raises:
            Conflict: the name is that of a shared task or, for a shared task, of a tenant's task.
        """
        others = [owner for owner in self.owners(name) if owner != tenant]
        if others and (tenant == SHARED or SHARED in others):
            raise Conflict(
                f"register task {name!r}",
                expected="an unused name",
                got="the name of a shared task" if tenant != SHARED else "one that tenants have",
            )

    def versions(self) -> Iterable[VersionRecord]:
        """Iterate over all versions of all tasks."""
        for tasks in self._tasks.values():
            for task in tasks.values():
                yield from task.versions.values()

    def replaced(self, changes: Iterable[tuple[str, str, TaskRecord | None]]) -> RegistrySnapshot:
        """Return a copy with some tasks replaced.

        Args:
            changes: tenant, name and task of each; None removes the task.
        """
        tasks = dict(self._tasks)
        copied: dict[str, dict[str, TaskRecord]] = {}
        for tenant, name, task in changes:
            own = copied.setdefault(tenant, dict(tasks.get(tenant, {})))
            own.pop(name, None)
            if task is not None:
                own[name] = task
        tasks.update(copied)
        return RegistrySnapshot(tasks)
