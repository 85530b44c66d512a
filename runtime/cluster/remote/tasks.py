"""Tasks of an ingress: which adapter each key stands for."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.errors import UnknownTask
from tpeft_deploy.runtime import Source
from tpeft_deploy.runtime.adapters.task_versions import Task
from tpeft_deploy.runtime.cluster.wire import TaskRef, digest_of, local_name

__all__ = ["RemoteTasks"]


class RemoteTasks:
    """Keys of registered versions and tasks of the bundle; thread-safe.

    Args:
        bundle: the bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._bundled = dict(bundle.tasks)
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()

    def register(self, sources: Mapping[str, Source]) -> None:
        """Know adapters by their digests."""
        with self._lock:
            self._digests |= {key: source.digest for key, source in sources.items()}

    def forget(self, keys: Iterable[str]) -> dict[str, str]:
        """Forget keys, all or none, and return what they were named on the replicas.

        Raises:
            UnknownTask: a key is not known.
        """
        wanted = [*keys]
        names = {key: self.name(key) for key in wanted}
        with self._lock:
            for key in wanted:
                self._digests.pop(key, None)
        return names

    def keys(self) -> list[str]:
        """Return all keys."""
        with self._lock:
            return [*self._bundled, *self._digests]

    def known(self, key: str) -> str | None:
        """Return the digest of a key; None for an unknown one, and for the base."""
        return self._digests.get(key) or self._bundled.get(key)

    def name(self, task: Task) -> str:
        """Return the name of a task on every replica.

        Raises:
            UnknownTask: there is no such task.
        """
        if task == BASE_TASK:
            return BASE_TASK
        digest = self._digests.get(task) if isinstance(task, str) else None
        if digest is not None:
            return local_name(digest)
        if isinstance(task, str) and task in self._bundled:
            return task
        raise UnknownTask(f"run task {task!r}", problem="there is no such task")

    def stored(self, digest: str) -> str:
        """Return the name of an adapter on every replica."""
        bundled = (task for task, own in self._bundled.items() if own == digest)
        return next(bundled, local_name(digest))

    def ref(self, task: Task | None) -> TaskRef:
        """Return a task, or a weighted set of them, as replicas know it."""
        if isinstance(task, Mapping):
            weights: dict[str, float] = {}
            for own, weight in task.items():  # tasks of two tenants may be one adapter
                name = self.name(own)
                weights[name] = weights.get(name, 0.0) + weight
            return weights
        return self.name(BASE_TASK if task is None else task)

    def digest(self, ref: TaskRef | None) -> str:
        """Return the digest that calls are routed by: of a weighted set its first; "base" for the base."""
        if ref is None:
            return BASE_TASK
        name = ref if isinstance(ref, str) else next(iter(ref))
        return BASE_TASK if name == BASE_TASK else digest_of(name) or self._bundled[name]
