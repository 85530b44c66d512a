"""Tasks that stay on the device until they are unpinned, and those of them that are folded too."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping

from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.adapters.task_versions import TaskVersions
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.component import ServedComponent
from tpeft_deploy.runtime.devices.spread import AnyResidency

__all__ = ["Pins"]


class Pins:
    """Pinned tasks: a pin belongs to the task, not to its version; safe to use from several threads.

    Args:
        versions: version of each task.
        residency: rows on the device.
        components: components with folded sessions.
    """

    def __init__(
        self, versions: TaskVersions, residency: AnyResidency, components: Collection[ServedComponent]
    ) -> None:
        self._versions = versions
        self._residency = residency
        self._components = components
        self._folded: dict[str, bool] = {}  # pinned task -> whether it is folded too
        self._lock = threading.Lock()  # the pins and what is done about them change together

    def all(self) -> dict[str, bool]:
        """The pinned tasks, and whether each is to be folded."""
        with self._lock:
            return dict(self._folded)

    def pin(self, task: str, *, folded: bool) -> None:
        """Pin a task, and return once its version is on the device and, with `folded`, has a session.

        Raises:
            UnknownTask, CapacityError, AdapterError, RunError: as `Runtime.pin`.
        """
        version = self._versions.adapter(task, "pin")
        with self._residency.acquire([version], everywhere=True), self._lock:
            self._residency.pin(version, True)
            self._folded[task] = folded
        # After the row is released: the fold may be queued behind one that waits for rows.
        try:
            self.apply(task, self._versions.adapter(task, "pin"))  # the task may have another version by now
        except TpeftError:
            with self._lock:
                if task in self._folded:  # unpinned meanwhile, it stays so
                    self._folded[task] = False
            raise

    def unpin(self, task: str) -> None:
        """Unpin a task and drop its folded session.

        Raises:
            UnknownTask: there is no such task, or it is the base.
        """
        self._versions.adapter(task, "unpin")
        with self._lock:
            self._folded.pop(task, None)
            self._release(self._versions.adapter(task, "unpin"))

    def apply(self, task: str, version: Version) -> None:
        """Pin and fold a version as its task is, or release it where the task is not pinned."""
        with self._lock:
            folded = self._folded.get(task)
            if folded is None:
                self._release(version)
                return
            self._residency.pin(version, True)
            changed = [own for own in self._components if own.changed_by(version)] if folded else []
            jobs = [job for component in changed for job in component.keep_folded(version)]
        for job in jobs:
            job.result()

    def apply_changed(self, versions: Mapping[str, Version]) -> None:
        """Bring the new versions of pinned tasks to the device."""
        for task in self.all().keys() & versions.keys():
            with self._residency.acquire([versions[task]], everywhere=True):
                self.apply(task, versions[task])

    def forget(self, tasks: Iterable[str]) -> None:
        """Remove the pins of tasks that are no longer served."""
        with self._lock:
            for task in tasks:
                self._folded.pop(task, None)

    def _release(self, version: Version) -> None:
        self._residency.pin(version, False)
        for component in self._components:
            component.drop_folded(version)
