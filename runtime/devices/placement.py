"""Which devices each task lives on: a cold one on one, a hot one on several.

Pure policy: no clock, no devices.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Sequence

from tpeft_deploy.runtime.folding.hotness import Heat

__all__ = ["Placement"]

_DECIDE = 1.0  # seconds between two decisions about a task


class Placement:
    """Homes of tasks among devices 0, 1, ...; safe to use from several threads.

    A new task is placed on the device with the least load, and stays there.  It is placed on one more for every
    `portion` of a device's load that it makes, so that no device is busy with a task that idle ones could run.

    Args:
        devices: number of devices.
        portion: part of a device's load that a task may make for each device that it is placed on.
        minimum: requests per second below which a task has one device.
        margin: factor between the load at which a task gets a device and the load at which it loses it, at least 1.
        window: seconds after which a request counts e times less.
    """

    def __init__(
        self,
        devices: int,
        *,
        portion: float = 0.5,
        minimum: float = 1.0,
        margin: float = 1.5,
        window: float = 60.0,
    ) -> None:
        self._places = range(devices)
        self._portion, self._minimum, self._margin = portion, minimum, margin
        self._heat = Heat[int | str](0, window=window)  # of devices, by number, and of tasks
        self._homes: dict[str, tuple[int, ...]] = {}
        self._decided: dict[str, float] = {}
        self._tasks = [0] * devices
        self._pinned: set[str] = set()
        self._lock = threading.Lock()  # guards all above

    def homes(self, task: str, now: float) -> tuple[int, ...]:
        """Return the devices of a task, the first one that it was placed on in front.

        Args:
            task: name of the task.
            now: seconds on the caller's monotonic clock.
        """
        with self._lock:
            own = self._homes.get(task, ())
            if not own or now - self._decided[task] >= _DECIDE:
                self._decided[task] = now
                own = self._settle(task, own, self._wanted(task, len(own), now), now)
            return own

    def record(self, task: str, now: float) -> None:
        """Count a request, for the task and for its devices."""
        homes = self.homes(task, now)
        self._heat.record(task, 1, now)
        for place in homes:
            self._heat.record(place, 1 / len(homes), now)

    def best(self, tasks: Collection[str], now: float) -> Sequence[int]:
        """Return the devices for a request, the best first.

        Those that have all its tasks; if there are none, all devices, in the order of how many of its tasks they have.
        """
        homes = [self.homes(task, now) for task in tasks]
        count = [sum(place in own for own in homes) for place in self._places]
        together = [place for place in self._places if count[place] == len(homes)]
        return together or sorted(self._places, key=lambda place: (-count[place], self._heat.rate(place, now), place))

    def pin(self, task: str) -> None:
        """Place a task on all devices, whatever its heat."""
        with self._lock:
            self._pinned.add(task)
            self._decided[task] = -math.inf

    def unpin(self, task: str) -> None:
        """Leave a task to its heat again."""
        with self._lock:
            self._pinned.discard(task)

    def forget(self, task: str) -> None:
        """Drop all that is known of a task that is no longer served."""
        with self._lock:
            for place in self._homes.pop(task, ()):
                self._tasks[place] -= 1
            self._decided.pop(task, None)
            self._pinned.discard(task)
            self._heat.forget(task)

    def _wanted(self, task: str, present: int, now: float) -> int:
        """Number of devices that a task should have."""
        if task in self._pinned:
            return len(self._places)
        rate, total = self._heat.rate(task, now), sum(self._heat.rate(place, now) for place in self._places)
        if total == 0:
            return 1
        shares = rate / total * len(self._places) / self._portion
        most = len(self._places) if rate >= self._minimum else 1
        wanted = max(1, min(most, math.ceil(shares)))
        if wanted >= present:
            return wanted
        most = len(self._places) if rate * self._margin >= self._minimum else 1
        return max(1, min(present, most, math.ceil(shares * self._margin)))

    def _settle(self, task: str, own: tuple[int, ...], wanted: int, now: float) -> tuple[int, ...]:
        def load(place: int) -> tuple[float, int, int]:
            return self._heat.rate(place, now), self._tasks[place], place

        others = sorted((place for place in self._places if place not in own), key=load)
        settled = own[:wanted] + tuple(others[: max(0, wanted - len(own))])
        for place in own:
            self._tasks[place] -= 1
        for place in settled:
            self._tasks[place] += 1
        self._homes[task] = settled
        return settled
