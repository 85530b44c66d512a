"""Models visible to a tenant (the base, the bundle, its tasks, registered tasks), and targets of a request's rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.errors import NotFound, ProtocolError, Unavailable
from tpeft_deploy.runtime.server.registry import CURRENT, State, TaskRecord, VersionRecord
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.v2.messages import BASE, InferRequest, ServedVersion
from tpeft_deploy.runtime.server.v2.metadata import ADAPTER_INPUT
from tpeft_deploy.tucker import Array

__all__ = ["Lookup", "Model", "Models", "Resolved", "page", "resolve"]

Lookup = Callable[[str, str, str], ServedVersion]
"""Resolves tenant, model name and version; raises NotFound when no visible task has that name and version."""


@dataclass(frozen=True)
class Model:
    """A model as seen by a tenant.

    Attributes:
        tenant: owner of the task.
        name: name of the model.
        versions: version number -> target, the lowest first.
        aliases: alias -> version number.
        mixed: whether rows select their tasks, as with the bundle's name.
        tag: entity tag of the task; None for models of the bundle.
    """

    tenant: str
    name: str
    versions: dict[str, ServedVersion]
    aliases: dict[str, str] = field(default_factory=dict)
    mixed: bool = False
    tag: str | None = None


class Models:
    """Lookup of models by name in immutable snapshots; never blocks.

    Args:
        bundle: bundle, with tasks shared by all tenants.
        state: the registry.
    """

    def __init__(self, bundle: Bundle, state: State) -> None:
        self.bundle = bundle.manifest.name
        self._state = state
        self._own = {task: ServedVersion(task, SHARED, task, "1", digest) for task, digest in bundle.tasks.items()}

    @property
    def reserved(self) -> frozenset[str]:
        """Names not available to registered tasks."""
        return frozenset({BASE_TASK, self.bundle, *self._own})

    def target(self, tenant: str, name: str, version: str = "") -> ServedVersion:
        """Return the target of a model name for a tenant.

        Raises:
            NotFound: no visible task has that name and version.
            Unavailable: the model was unloaded.
        """
        found = self.version(tenant, name, version)
        unloaded = self._state.placements.now.unloaded
        if unloaded and (found.tenant, name) in unloaded:
            raise Unavailable(f"run model {name!r}", problem="it was unloaded", fix="Load it again.")
        return found

    def version(self, tenant: str, name: str, version: str = "") -> ServedVersion:
        """Return a version of a task, loaded or not.

        Raises:
            NotFound: no visible task has that name and version.
        """
        found = self._own.get(name)
        if found is not None:
            if version not in {"", found.version, CURRENT}:
                raise NotFound(f"find model {name!r}", expected=f"version {found.version}", got=repr(version))
            return found
        return target_of(self._state.tasks.snapshot().find(tenant, name, version))

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
        return (model.tenant, model.name) not in self._state.placements.now.unloaded

    def key(self, tenant: str, name: str, version: str) -> str:
        """Return the key of a version in the runtime, loaded or not.

        Raises:
            NotFound: the version was deleted.
        """
        found = self._own.get(name) if tenant == SHARED else None
        if found is None:
            return self._state.tasks.snapshot().find(tenant, name, version).key
        return found.key

    def _fixed(self, name: str) -> Model:
        if name in self._own:
            own = self._own[name]
            return Model(SHARED, name, {own.version: own}, {CURRENT: own.version})
        return Model(SHARED, name, {"1": BASE}, {CURRENT: "1"}, mixed=name == self.bundle)


def _model_of(task: TaskRecord) -> Model:
    versions = {str(number): target_of(task.versions[number]) for number in sorted(task.versions)}
    aliases = {alias: str(number) for alias, number in task.aliases.items()}
    return Model(task.tenant, task.name, versions, aliases, tag=task.tag)


def target_of(record: VersionRecord) -> ServedVersion:
    """Return the target of a registered version."""
    return ServedVersion(record.key, record.tenant, record.task, str(record.number), record.digest)


class Resolved(NamedTuple):
    """Targets of a request: one for all rows, or one per row."""

    targets: Sequence[ServedVersion]
    per_row: bool


def resolve(find: Lookup, bundle: str, tenant: str, request: InferRequest, model: str | None = None) -> Resolved:
    """Resolve the targets of a request for `model`, by default the model that it names.

    A task name selects that task; the bundle's name and `base` use the parameter (or header) `adapter`, and the
    bundle's name also the input `adapter`. Conflicting names are refused, and so is the bundle's name without an
    adapter: the base's output could be mistaken for the task's.

    Raises:
        ProtocolError: no adapter, two different ones, or an invalid input `adapter`.
        NotFound: a task is not visible to the tenant; the error names the row if there are several.
    """
    model = request.model if model is None else model
    if model != bundle:
        return Resolved([_single(find, tenant, request, model)], per_row=False)
    _check_version(request)
    rows = request.inputs.get(ADAPTER_INPUT)
    if rows is None:
        if request.adapter is None:
            raise ProtocolError(
                f"run model {bundle!r}",
                expected=f"an input {ADAPTER_INPUT!r} of datatype BYTES, or a parameter of that name",
                got="neither",
                fix=f"Name a task for all rows or one for each; {BASE_TASK!r} is the model without adapter.",
            )
        return Resolved([_by_name(find, tenant, request.adapter)], per_row=False)
    names = _names(bundle, rows)
    if request.adapter is not None and set(names) != {request.adapter}:
        raise _disagreement(request, f"input {ADAPTER_INPUT!r} with {', '.join(sorted(set(names))[:4])}")
    known: dict[str, ServedVersion] = {}
    for row, name in enumerate(names):
        if name not in known:
            known[name] = _by_name(find, tenant, name, row if len(names) > 1 else None)
    return Resolved([known[name] for name in names], per_row=len(names) > 1)


def _single(find: Lookup, tenant: str, request: InferRequest, model: str) -> ServedVersion:
    if model == BASE_TASK:
        _check_version(request)
        return BASE if request.adapter is None else _by_name(find, tenant, request.adapter)
    found = find(tenant, model, request.version)
    if request.adapter is not None and request.adapter != model:
        raise _disagreement(request, f"model {request.model!r}")
    return found


def _by_name(find: Lookup, tenant: str, name: str, row: int | None = None) -> ServedVersion:
    """Resolve `name` or `name@version`."""
    if name == BASE_TASK:
        return BASE
    task, _, version = name.partition("@")
    try:
        return find(tenant, task, version)
    except NotFound as error:
        if row is None:
            raise
        raise NotFound(f"run row {row}", problem=str(error)) from error


def _names(bundle: str, rows: Array) -> list[str]:
    if rows.ndim != 1 or rows.dtype != object or not rows.size:
        raise ProtocolError(
            f"run model {bundle!r}, input {ADAPTER_INPUT!r}",
            expected="BYTES of shape [1], or [B] with one name per row",
            got=f"{'BYTES' if rows.dtype == object else rows.dtype} of shape {list(rows.shape)}",
        )
    try:
        return [name.decode() for name in rows]
    except UnicodeDecodeError:
        raise ProtocolError(
            f"run model {bundle!r}, input {ADAPTER_INPUT!r}", expected="names in UTF-8", got="other bytes"
        ) from None


def _check_version(request: InferRequest) -> None:
    if request.version not in {"", "1"}:
        raise NotFound(f"run model {request.model!r}", expected="version 1", got=repr(request.version))


def _disagreement(request: InferRequest, other: str) -> ProtocolError:
    return ProtocolError(
        f"run model {request.model!r}",
        expected="one adapter",
        got=f"parameter or header {ADAPTER_INPUT!r} {request.adapter!r} and {other}",
        fix="Name it once.",
    )


def page(models: Iterator[Model], limit: int | None) -> Iterator[Model]:
    """Cut a list of models behind `limit`, never between models of one name; None is no limit."""
    last = None
    for count, model in enumerate(models):
        if limit is not None and count >= limit and model.name != last:
            return
        last = model.name
        yield model
