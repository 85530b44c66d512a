"""Models visible to a tenant: the base, the bundle, its tasks, and registered tasks."""

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
    """A model as seen by a tenant.

    Attributes:
        tenant: owner of the task.
        name: name of the model.
        versions: version number -> target, the lowest first.
        aliases: alias -> version number.
        mixed: whether rows select their tasks, as with the bundle's name.
    """

    tenant: str
    name: str
    versions: dict[str, Target]
    aliases: dict[str, str] = field(default_factory=dict)
    mixed: bool = False


class Models:
    """Lookup of models by name in immutable snapshots; never blocks.

    Args:
        bundle: bundle, with tasks shared by all tenants.
        state: the registry.
    """

    def __init__(self, bundle: Bundle, state: State) -> None:
        self.bundle = bundle.manifest.name
        self._state = state
        self._own = {task: Target(task, SHARED, task, "1", digest) for task, digest in bundle.tasks.items()}
        self._unloaded: set[tuple[str, str]] = set(state.placements.unloaded())

    @property
    def reserved(self) -> frozenset[str]:
        """Names not available to registered tasks."""
        return frozenset({BASE_TASK, self.bundle, *self._own})

    def target(self, tenant: str, name: str, version: str = "") -> Target:
        """Return the target of a model name for a tenant.

        Raises:
            NotFound: no visible task has that name and version.
            Unavailable: the model was unloaded.
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
        """Return a model with one version, or with all of them.

        Raises:
            NotFound: no visible task has that name and version.
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
        """Return all visible tasks by name; sorts them, so it must not run on the event loop."""
        return self._state.tasks.snapshot().visible(tenant)

    def listed(self, records: Sequence[TaskRecord], after: str | None = None) -> Iterator[Model]:
        """Yield the models of the bundle and of registered tasks.

        Args:
            records: tasks sorted by name.
            after: name after which the listing starts.
        """
        fixed = [BASE_TASK, self.bundle, *self._own]
        if after in fixed:
            fixed = fixed[fixed.index(after) + 1 :]
        elif after is not None:
            fixed, records = [], records[bisect_right(records, after, key=lambda task: task.name) :]
        yield from map(self._fixed, fixed)
        yield from map(_model_of, records)

    def is_ready(self, model: Model) -> bool:
        """Whether a model is loaded."""
        return (model.tenant, model.name) not in self._unloaded

    def key(self, tenant: str, name: str, version: str) -> str:
        """Return the key of a version in the runtime, loaded or not.

        Raises:
            NotFound: the version was deleted.
        """
        found = self._own.get(name) if tenant == SHARED else None
        if found is None:
            return self._state.tasks.snapshot().find(tenant, name, version).key
        return found.key

    def unload(self, own: tuple[str, str]) -> None:
        """Refuse requests for a model until `reload`."""
        self._unloaded = self._unloaded | {own}

    def reload(self, own: tuple[str, str]) -> None:
        """Accept requests for a model again."""
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
    """Return the target of a registered version."""
    return Target(record.key, record.tenant, record.task, str(record.number), record.digest)
