"""The tasks of a runtime: loading, registration, residency and pins."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle, check_task
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.errors import AdapterError, RunError, UnknownTask
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.task_versions import Task, TaskVersions
from tpeft_deploy.runtime.adapters.version import Source, Tier, Version
from tpeft_deploy.runtime.component import ServedComponent
from tpeft_deploy.runtime.devices.spread import AnyResidency, SpreadResidency
from tpeft_deploy.runtime.folding.compare import differs
from tpeft_deploy.runtime.generation.service import GenerationService
from tpeft_deploy.runtime.pins import Pins

__all__ = ["ServedTasks"]

_REGISTERED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:-]{0,127})?/[A-Za-z0-9][A-Za-z0-9._:-]{0,127}@[1-9][0-9]{0,17}")
_log = logging.getLogger("tpeft_deploy.runtime")


class ServedTasks:
    """Base class of `Runtime`: operations on tasks; `Runtime` makes the parts that they work on."""

    _bundle: Bundle  # with the tasks on disk
    _base: Bundle  # the bundle, or a private copy, that sessions read
    _versions: TaskVersions
    _placed: AnyResidency  # of one device, or over several
    _loader: AdapterLoader
    _pins: Pins
    _parts: Collection[ServedComponent]
    _generation: GenerationService

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self._bundle.manifest.name

    @property
    def only_folded(self) -> bool:
        """Whether tasks without a folded session are refused, as the provider does not compute the bank."""
        return any(part.only_folded for part in self._parts)

    @property
    def tasks(self) -> list[str]:
        """The tasks that can be run, without `base`."""
        return self._versions.tasks

    def residency(self, tasks: Iterable[str] | None = None) -> dict[str, Tier]:
        """Return where tasks are: "disk", "host", "device" (a row of the bank), or "folded" (a separate session).

        Args:
            tasks: names; all by default.  Unknown ones, and the base, are left out.
        """
        found: dict[str, Tier] = {}
        for task in self.tasks if tasks is None else tasks:
            try:
                version = self._versions.find(task)
            except UnknownTask:  # forgotten by another thread
                continue
            if not version.is_base:
                found[task] = "folded" if self._is_folded(version) else self._placed.tier(version)
        return found

    def ranks(self, tasks: Iterable[str]) -> dict[str, int]:
        """Return the largest rank of each adapter that was read; 0 for one without changes of low rank.

        Args:
            tasks: names; unknown ones, and the base, are left out.
        """
        found: dict[str, int] = {}
        for task in tasks:
            with suppress(UnknownTask):
                known = (version.rank for _, version in self._versions.find(task).everywhere())
                rank = next((own for own in known if own is not None), None)
                if rank is not None:
                    found[task] = rank
        return found

    def pins(self) -> dict[str, bool]:
        """The tasks that are pinned, and whether each is to have a separate session."""
        return self._pins.all()

    def labels(self, task: Task = BASE_TASK) -> HeadLabels | None:
        """Return the classes of a task's head; reads the adapter.

        They are those that its adapter records, or the base's if it has the base's head; None where none are known.

        Raises:
            UnknownTask, CompositionError: as `run`.
            AdapterError, BundleError: the adapter cannot be read.
        """
        version = self._versions.find(task, doing=f"look up the labels of task {task!r}")
        adapter = None if version.is_base else version.read()
        if adapter is not None:
            varying = [port.varies.override for part in self._parts for port in part.manifest.outputs if port.varies]
            if adapter.labels is not None or any(name in adapter.overrides for name in varying):
                return adapter.labels
        return TextFacts.read(self._bundle).labels if self._bundle.manifest.text else None

    def load(self, task: str, adapter: str | os.PathLike[str] | Adapter | None = None) -> None:
        """Serve an adapter, in place of an earlier one of that name; the bundle on disk stays as it is.

        It is read, checked and on the device when this returns.  Runs in flight finish on the earlier one.

        Args:
            task: name to serve it under.
            adapter: path or module as `load_adapter` takes it, or an adapter, which is copied; None for the version
                that the bundle now has on disk under that name.

        Raises:
            AdapterError: it cannot be read or does not fit; the old one goes on being served.
            BundleError: the name is not allowed.
            CapacityError: it does not fit into the budget.
        """
        check_task(task, self.name)
        if adapter is None:
            version = self._versions.stored(task)
        elif isinstance(adapter, Adapter):
            version = self._versions.held(task, adapter)
        else:
            version = self._versions.held(task, load_adapter(adapter, base=self._base.base_view), copied=False)
        served = False
        try:
            with self._placed.acquire([version], everywhere=task in self._pins.all()):
                self._pins.apply(task, version)
                self._versions.put({task: version})
                served = True
                self._pins.apply(task, version)  # it may have been pinned or unpinned meanwhile
        except BaseException:
            if not served:
                self._retire(version)  # else it would stay pinned, for a task that never stood for it
            raise

    def register(self, sources: Mapping[str, Source]) -> None:
        """Know adapters from outside the bundle without reading them: each is read when it is first asked for.

        A task that stands for the same content already goes on as it is; one that is pinned is brought and folded as
        by `load`.

        Args:
            sources: task -> source of its adapter.  A name may also be "TENANT/TASK@VERSION", as the server has them.

        Raises:
            BundleError: a name is not allowed; none is known then.
            AdapterError, CapacityError: one that is pinned cannot be brought; all are known.
        """
        for task in sources:
            if not _REGISTERED.fullmatch(task):
                check_task(task, self.name)
        found = {task: Version(task, source.digest, source.read) for task, source in sources.items()}
        changed = self._versions.changed(found)
        self._versions.put(changed)
        self._pins.apply_changed(changed)

    def forget(self, tasks: Iterable[str]) -> None:
        """`unload` of several: all of them or, where one is unknown, none.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        names = list(tasks)
        self._versions.remove(names)
        self._pins.forget(names)

    def probe(self, task: str) -> bool:
        """Whether a task answers differently from the base on the example of any component.

        Raises:
            UnknownTask: there is no such task.
            AdapterError, BundleError, CapacityError: it cannot be served, or an output is not finite.
        """
        version = self._versions.adapter(task, "probe")
        with self._placed.acquire([version]):  # so that what it changes is known
            changed = [component for component in self._parts if component.changed_by(version)]
            acting = [_probed(component, task, version, self._versions.base) for component in changed]
        return any(acting)

    def unload(self, task: str) -> None:
        """Stop serving a task; runs in flight finish on it.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        self.forget([task])

    def pin(self, task: str, *, folded: bool = False) -> None:
        """Keep a task resident until `unpin`, whatever else needs room.

        Args:
            task: name of a task.
            folded: whether to fold it into a separate session too, which costs what the base costs and holds separate
                weights.  Made in the background; runs go on from the bank and change over when it is ready, which is
                when this returns.

        Raises:
            UnknownTask: there is no such task, or it is the base.
            CapacityError: it does not fit into the budget beside those that are pinned.
            AdapterError, RunError: it cannot be folded; it stays pinned on the bank.
        """
        self._pins.pin(task, folded=folded)

    def unpin(self, task: str) -> None:
        """Let a task be evicted again when others need room, and drop its folded session at once.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        self._pins.unpin(task)

    def prefetch(self, tasks: Iterable[Task]) -> Future[None]:
        """Begin to bring tasks to the device in the background.

        Returns:
            Done once they are there; its exception says which could not be brought.

        Raises:
            UnknownTask: there is no such task.
        """
        return self._loader.prefetch([self._versions.find(task, doing=f"prefetch task {task!r}") for task in tasks])

    def _preload(self) -> None:
        for task in self.tasks:
            if self._placed.full:
                _log.info(
                    "%d of %d tasks fit on the device at once", self._placed.usage()["rows_taken"], len(self.tasks)
                )
                return
            self._loader.bring([self._versions.adapter(task, "load")])

    def _prepare(self, *, preload: bool) -> None:
        """Bring tasks to the device where `preload` is set, and prove the provider."""
        if preload:
            self._preload()
        first = [self._versions.adapter(task, "load") for task in [*self._bundle.tasks][:1]]
        for component in self._parts:
            component.check_provider([self._versions.base, *first])

    def _retire(self, version: Version) -> None:
        self._placed.retire(version)  # first: a fold in progress looks at this last
        for component in self._parts:
            component.drop_folded(version)
        self._generation.forget(version)
        if isinstance(self._placed, SpreadResidency) and not self._versions.knows(version.name):
            self._placed.forget(version.name)

    def _is_folded(self, version: Version) -> bool:
        """Whether every component that a version changes has a session for it."""
        having = [component for component in self._parts if component.is_folded(version)]
        return bool(having) and all(own in having or not own.changed_by(version) for own in self._parts)


def _probed(component: ServedComponent, task: str, version: Version, base: Version) -> bool:
    example = requests.check_inputs(component.manifest, component.bundle.example())
    replica = component.replica([version])
    # Both from the bank: a folded session rounds differently.
    expected = replica.engine.run_banked(example, base)
    try:
        own = replica.engine.run_banked(example, replica.own([version])[0])
    except RunError as error:
        if type(error) is not RunError or error.__cause__ is None:
            raise
        # The base ran on the same graph and inputs.
        raise AdapterError(f"probe task {task!r} on the bundle's example", problem=error.problem) from error
    return differs(expected, own, task=task)
