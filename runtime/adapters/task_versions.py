"""The version that each task, and each weighted set of tasks, stands for."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.composition import compose
from tpeft_deploy.errors import CompositionError, InputError, UnknownTask, did_you_mean
from tpeft_deploy.formats import canonical
from tpeft_deploy.runtime.adapters.version import Version

__all__ = ["TaskVersions", "Task"]

Task = str | Mapping[str, float]

_SETS = 1024  # weighted sets that are remembered


class TaskVersions:
    """Task -> version, swapped atomically; safe to use from several threads.

    Args:
        bundle: its tasks are known from the start, and nothing of them is read yet.
        retire: called with every version that nothing stands for any more.

    Attributes:
        base: version of the base.
    """

    def __init__(self, bundle: Bundle, retire: Callable[[Version], None]) -> None:
        self.base = Version.of_base(bundle.sizes(None))
        self._bundle = bundle
        self._retire = retire
        self._lock = threading.Lock()
        self._versions = {task: self._stored(task, digest) for task, digest in bundle.tasks.items()}
        self._sets: OrderedDict[tuple[tuple[Version, float], ...], Version] = OrderedDict()

    @property
    def tasks(self) -> list[str]:
        """All tasks, sorted."""
        return sorted(self._versions)

    def find(self, task: Task, *, doing: str | None = None) -> Version:
        """Return the version that a task stands for now.

        Args:
            task: a name, or name -> strength of a weighted set.
            doing: begins the message of errors.

        Raises:
            UnknownTask: there is no such task.
            CompositionError: the set is empty, or names the base.
        """
        if isinstance(task, str):
            return self.base if task == BASE_TASK else self._known(task, doing)
        if isinstance(task, Mapping):
            return self._set(task, doing or f"run the weighted set {dict(task)}")
        raise InputError(
            doing or "run a batch",
            expected="a task's name, or a mapping of names to strengths",
            got=repr(task),
            fix="Use tasks=[...] for one task per row.",
        )

    def knows(self, task: str) -> bool:
        """Whether there is a task of that name."""
        return task in self._versions

    def adapter(self, task: str, verb: str) -> Version:
        """Return the version of a task that has an adapter.

        Args:
            task: name of a task.
            verb: begins the message of errors.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        version = self.find(task, doing=f"{verb} task {task!r}")
        if version.is_base:
            raise UnknownTask(f"{verb} task {task!r}", expected="a task with an adapter", got="the base, always there")
        return version

    def put(self, versions: Mapping[str, Version]) -> None:
        """Let tasks stand for versions; earlier ones are dropped with their last release."""
        with self._lock:
            old = [self._versions[task] for task in versions if task in self._versions]
            self._versions = {**self._versions, **versions}
        self._replaced(old)

    def changed(self, versions: Mapping[str, Version]) -> dict[str, Version]:
        """Return the versions with content other than that of the tasks' present versions."""
        now = self._versions
        return {
            task: version
            for task, version in versions.items()
            if (known := now.get(task)) is None or known.digest != version.digest
        }

    def remove(self, tasks: Sequence[str]) -> None:
        """Forget tasks.

        Raises:
            UnknownTask: there is no such task, or it is the base; none is forgotten then.
        """
        with self._lock:
            for task in tasks:
                if task not in self._versions:
                    raise self._unknown(f"unload task {task!r}", task)
            old = [self._versions[task] for task in tasks]
            gone = set(tasks)
            self._versions = {task: version for task, version in self._versions.items() if task not in gone}
        self._replaced(old)

    def stored(self, task: str) -> Version:
        """A new version of what the bundle on disk has under a name.

        Raises:
            UnknownTask, IntegrityError: it has none, or a damaged one.
        """
        return self._stored(task, self._bundle.digest(task))

    def held(self, task: str, adapter: Adapter, *, copied: bool = True) -> Version:
        """A new version of an adapter from outside the bundle.

        Args:
            task: name of the task.
            adapter: the adapter.
            copied: whether its arrays are copied, as the caller may change them.
        """
        source = f"task {task!r}, loaded from {adapter.source}"
        own = canonical.from_bytes(adapter.to_bytes(), source=source) if copied else replace(adapter, source=source)
        # Registrations, weighted sets and sequences ask for the digest; a load takes half as long without it.
        return Version(task, lambda: hashlib.sha256(own.to_bytes()).hexdigest(), lambda: own)

    def _stored(self, task: str, digest: str) -> Version:
        return Version(task, digest, partial(self._bundle.version, task, digest, native=False))

    def _known(self, task: str, doing: str | None) -> Version:
        version = self._versions.get(task)
        if version is None:
            raise self._unknown(doing or f"run task {task!r}", task)
        return version

    def _set(self, strengths: Mapping[str, float], doing: str) -> Version:
        if not strengths or BASE_TASK in strengths:
            raise CompositionError(
                doing,
                expected="one task or more, each with its strength",
                got="none" if not strengths else "the base, which changes nothing",
                fix="Name tasks only; the base is in every answer already.",
            )
        for name, strength in strengths.items():
            if not _is_number(strength):
                raise CompositionError(f"{doing}, {name!r}", expected="a finite number as strength", got=repr(strength))
        parts = [(self._known(name, doing), float(strength)) for name, strength in sorted(strengths.items())]
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        key = tuple(parts)
        with self._lock:
            found = self._sets.get(key)
            if found is not None:
                self._sets.move_to_end(key)
                return found
        shown = ", ".join(f"{name}: {strength:g}" for name, strength in sorted(strengths.items()))
        digest = hashlib.sha256(repr([(v.digest, s) for v, s in parts]).encode()).hexdigest()
        made = Version(f"{{{shown}}}", digest, lambda: self._compose(parts))
        old = []
        with self._lock:
            if any(self._versions.get(part.name) is not part for part, _ in parts):
                made.current = False  # a part was replaced just now, and would not be retired later
                return made
            found = self._sets.setdefault(key, made)
            while len(self._sets) > _SETS:
                old.append(self._sets.popitem(last=False)[1])
        for version in old:
            self._retire(version)
        return found

    def _compose(self, parts: Sequence[tuple[Version, float]]) -> Adapter:
        adapters = {version.name: (version.read(), strength) for version, strength in parts}
        return compose(adapters, aliases=self._bundle.manifest.shared)

    def _replaced(self, old: Sequence[Version]) -> None:
        if not old:
            return
        replaced = set(old)
        with self._lock:
            stale = [key for key in self._sets if any(part in replaced for part, _ in key)]
            gone = [self._sets.pop(key) for key in stale]
        for version in [*old, *gone]:
            self._retire(version)

    def _unknown(self, doing: str, task: str) -> UnknownTask:
        # Without the tasks of tenants, which other tenants may not learn of.
        known = [BASE_TASK, *sorted(name for name in self._versions if "/" not in name)]
        shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        return UnknownTask(
            doing,
            expected=f"one of {shown}",
            got=repr(task),
            fix=did_you_mean(task, known)
            + "Load it with Runtime.load, or add it to the bundle with 'tpeft-deploy adapter add'.",
        )


def _is_number(strength: object) -> bool:
    number = isinstance(strength, int | float | np.number) and not isinstance(strength, bool)
    return number and math.isfinite(strength)  # type: ignore[arg-type]  # mypy does not follow `number`
