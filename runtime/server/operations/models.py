"""The models that a tenant sees: the base, the bundle, its tasks, and the registry's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.errors import NotFound, Unavailable
from tpeft_deploy.runtime.server.registry import CURRENT, State, TaskRecord, VersionRecord
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.v2.messages import Target

__all__ = ["Model", "Models"]


@dataclass(frozen=True)
class Model:
    """One model as a tenant sees it.

    Attributes:
        tenant: whose it is.
        name: its name.
        versions: number -> what it runs on, the lowest first; the bundle's own model runs on nothing by itself.
        aliases: name -> number.
        mixed: rows choose their tasks: the bundle's own model.
    """

    tenant: str
    name: str
    versions: dict[str, Target]
    aliases: dict[str, str] = field(default_factory=dict)
    mixed: bool = False


class Models:
    """Finds models by name; reads immutable snapshots only, so it never waits.

    Args:
        bundle: its tasks are shared by all tenants.
        state: the registry.
    """

    def __init__(self, bundle: Bundle, state: State) -> None:
        self.bundle = bundle.manifest.name
        self._state = state
        self._own = {task: Target(task, SHARED, task, "1", digest) for task, digest in bundle.tasks.items()}
        self._unloaded: set[tuple[str, str]] = set(state.placements.unloaded())

    @property
    def reserved(self) -> frozenset[str]:
        """Names that no registered task may have."""
        return frozenset({BASE_TASK, self.bundle, *self._own})

    def target(self, tenant: str, name: str, version: str = "") -> Target:
        """What a tenant's request for a name runs on.

        Raises:
            NotFound: there is none of that name or version that the tenant may see.
            Unavailable: it was unloaded.
        """
        found = self._own.get(name)
        if found is not None:
            if version not in {"", found.version, CURRENT}:
                raise NotFound(f"find model {name!r}", expected=f"version {found.version}", got=repr(version))
        else:
            found = target_of(self._state.tasks.snapshot().find(tenant, name, version))
        if self._unloaded and (found.tenant, name) in self._unloaded:
            raise Unavailable(f"run model {name!r}", problem="it was unloaded", fix="Load it again.")
        return found

    def model(self, tenant: str, name: str, version: str = "") -> Model:
        """The model of a name, with the one version or all of them.

        Raises:
            NotFound: there is none of that name or version that the tenant may see.
        """
        if name in {BASE_TASK, self.bundle} or name in self._own:
            model = self._fixed(name)
            if version not in {"", CURRENT, *model.versions}:
                raise NotFound(f"find model {name!r}", expected=f"version {', '.join(model.versions)}", got=version)
            return model
        snapshot = self._state.tasks.snapshot()
        task = snapshot.task(tenant, name)
        if not version:
            return _model_of(task)
        record = task.version(version)
        return replace(_model_of(task), versions={str(record.number): target_of(record)})

    def registered(self, tenant: str | None) -> list[TaskRecord]:
        """All tasks that a tenant sees, by name; sorts them, so not on the event loop."""
        return self._state.tasks.snapshot().visible(tenant)

    def listed(self, records: Sequence[TaskRecord], after: str | None = None) -> Iterator[Model]:
        """The models of the bundle and of registered tasks, one by one.

        Args:
            records: the tasks, by name.
            after: name of the model after which to begin.
        """
        fixed = [BASE_TASK, self.bundle, *self._own]
        if after in fixed:
            fixed = fixed[fixed.index(after) + 1 :]
        elif after is not None:
            fixed, records = [], records[bisect_right(records, after, key=lambda task: task.name) :]
        yield from map(self._fixed, fixed)
        yield from map(_model_of, records)

    def is_ready(self, model: Model) -> bool:
        """Whether it has not been unloaded."""
        return (model.tenant, model.name) not in self._unloaded

    def key(self, tenant: str, name: str, version: str) -> str:
        """The runtime's name of a version of a tenant's own task, loaded or not.

        Raises:
            NotFound: it is no longer there.
        """
        found = self._own.get(name) if tenant == SHARED else None
        if found is None:
            return self._state.tasks.snapshot().find(tenant, name, version).key
        return found.key

    def unload(self, own: tuple[str, str]) -> None:
        """Refuse requests for a tenant's model until `reload`."""
        self._unloaded = self._unloaded | {own}

    def reload(self, own: tuple[str, str]) -> None:
        """Take requests for it again."""
        self._unloaded = self._unloaded - {own}

    def _fixed(self, name: str) -> Model:
        if name in self._own:
            own = self._own[name]
            return Model(SHARED, name, {own.version: own}, {CURRENT: own.version})
        base = Target(BASE_TASK, SHARED, BASE_TASK, "1", BASE_TASK)
        return Model(SHARED, name, {"1": base}, {CURRENT: "1"}, mixed=name == self.bundle)


def _model_of(task: TaskRecord) -> Model:
    versions = {str(number): target_of(task.versions[number]) for number in sorted(task.versions)}
    return Model(task.tenant, task.name, versions, {alias: str(number) for alias, number in task.aliases.items()})


def target_of(record: VersionRecord) -> Target:
    """What a registered version runs on."""
    return Target(record.key, record.tenant, record.task, str(record.number), record.digest)
