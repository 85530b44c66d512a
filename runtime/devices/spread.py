"""Residency on several devices, each with a separate bank and separate budgets."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.adapters.bank import Layout
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.residency import Residency
from tpeft_deploy.runtime.adapters.version import Content, Tier, Version, adapters
from tpeft_deploy.runtime.devices.placement import Placement

__all__ = ["AnyResidency", "SpreadResidency", "open_residencies"]

_log = logging.getLogger("tpeft_deploy.runtime")


class SpreadResidency:
    """As `Residency`, over several devices; safe to use from several threads.

    Callers pass the versions of the first device; `Version.on` returns those of the others.

    Args:
        residencies: residency of each device.
        placement: devices of each task.
        clock: seconds since any moment.
    """

    def __init__(
        self, residencies: Sequence[Residency], placement: Placement, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._residencies = residencies
        self._placement = placement
        self._clock = clock
        self._turn = itertools.count()
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="tpeft-spread")
        self._lock = threading.Lock()
        self._copying: set[tuple[Version, int]] = set()  # those that failed stay, and are not tried again
        placement.pin(BASE_TASK)

    def acquire(self, versions: Sequence[Version], *, new: bool = False, everywhere: bool = False) -> Held:
        """Bring versions to a device that they live on, or to all, and acquire them there.

        Args:
            versions, new: as for `Residency.acquire`.
            everywhere: whether on every device.

        Raises:
            AdapterError, BundleError, CapacityError: as there.
        """
        places = range(len(self._residencies)) if everywhere else self._best(versions)[:1]
        found: dict[int, Held] = {}
        try:
            for place in places:  # in one order, so that no two wait for each other
                found[place] = self._residencies[place].acquire(_on(versions, place), new=new)
        except BaseException:
            for held in found.values():
                held.release()
            raise
        return self._joined(versions, found)

    def try_acquire(self, versions: Sequence[Version], *, new: bool = False) -> Held | None:
        """Acquire versions on all devices for them that have all of them already; never waits.

        Args:
            versions, new: as for `Residency.try_acquire`.
        """
        self._record(versions)
        places = self._best(versions)
        tried = {place: self._residencies[place].try_acquire(_on(versions, place), new=new) for place in places}
        found = {place: held for place, held in tried.items() if held is not None}
        if not found:
            return None
        self._follow(versions)
        return self._joined(versions, found)

    def choose(self, versions: Sequence[Version]) -> int:
        """Return the device for a run: of those that have all versions, each in turn."""
        self._record(versions)
        places = self._best(versions)
        having = [place for place in places if all(own.row is not None for own in _on(versions, place))]
        if not having:
            return places[0]
        self._follow(versions)
        return having[next(self._turn) % len(having)]

    def retire(self, version: Version) -> None:
        """Drop a version that no task stands for any more, now or with its last release, on each device."""
        self._residencies[0].retire(version)
        for place, own in version.everywhere()[1:]:
            self._residencies[place].retire(own)
        with self._lock:
            self._copying = {key for key in self._copying if key[0] is not version}

    def forget(self, task: str) -> None:
        """Forget where a task that is no longer served lives."""
        self._placement.forget(task)

    def pin(self, version: Version, pinned: bool) -> None:
        """As `Residency.pin`, on every device, where the task then lives.

        Raises:
            CapacityError: pinned versions would take more than their part of the rows of a device.
        """
        done: list[int] = []
        try:
            for place, residency in enumerate(self._residencies):
                residency.pin(version.on(place), pinned)
                done.append(place)
        except BaseException:
            for place in done:
                self._residencies[place].pin(version.on(place), not pinned)
            raise
        (self._placement.pin if pinned else self._placement.unpin)(version.name)

    def tier(self, version: Version) -> Tier:
        """Where a version is, on the device that it is nearest to being run on."""
        found = {self._residencies[place].tier(own) for place, own in version.everywhere()}
        return next(tier for tier in _NEAREST if tier in found)

    @property
    def full(self) -> bool:
        """Whether one more adapter might push another out."""
        return any(residency.full for residency in self._residencies)

    def usage(self) -> dict[str, int]:
        """The sum of `Residency.usage` of all devices."""
        found = [residency.usage() for residency in self._residencies]
        return {key: sum(own[key] for own in found) for key in found[0]}

    def close(self) -> None:
        """End all waits for rows, and copies to further devices."""
        for residency in self._residencies:
            residency.close()
        self._copier.shutdown(cancel_futures=True)

    def _best(self, versions: Sequence[Version]) -> Sequence[int]:
        return self._placement.best({version.name for version in versions}, self._clock())

    def _record(self, versions: Sequence[Version]) -> None:
        now = self._clock()
        for name in {version.name for version in versions}:
            self._placement.record(name, now)

    def _joined(self, versions: Sequence[Version], found: dict[int, Held]) -> Held:
        def release(_: object) -> None:
            for held in found.values():
                held.release()

        first = next(iter(found))
        return Held(versions, lambda own: self._residencies[first].rows(_on(list(own), first)), release, tuple(found))

    def _follow(self, versions: Sequence[Version]) -> None:
        """Bring versions that live on several devices to all of them, in the background."""
        now = self._clock()
        for version in adapters(versions):
            homes = self._placement.homes(version.name, now)
            for place in homes if len(homes) > 1 else ():
                if version.on(place).row is None:
                    self._copy(version, place)

    def _copy(self, version: Version, place: int) -> None:
        with self._lock:
            if (version, place) in self._copying:
                return
            self._copying.add((version, place))
        try:
            self._copier.submit(self._bring, version, place)
        except RuntimeError:  # the runtime is being closed
            return

    def _bring(self, version: Version, place: int) -> None:
        try:
            self._residencies[place].acquire([version.on(place)], new=True).release()
        except TpeftError as error:
            _log.warning("task %r stays on fewer devices: %s", version.name, error)
            return
        with self._lock:
            self._copying.discard((version, place))


AnyResidency = Residency | SpreadResidency


def open_residencies(
    layout: Layout,
    lay_out: Callable[[Adapter], Content],
    devices: Sequence[str],
    *,
    device_bytes: int,
    host_bytes: int | None,
    pinned_share: float,
) -> tuple[Sequence[Residency], AnyResidency]:
    """Open a bank on each device.

    Args:
        layout, lay_out, device_bytes, pinned_share: as for `Residency`.
        devices: memory device of each bank.
        host_bytes: as for `Residency`; by default 1 GiB, and none for a bank in host memory.

    Returns:
        The residency of each device, and what stands for all of them.
    """
    found = [
        Residency(
            layout,
            lay_out,
            device,
            device_bytes=device_bytes,
            host_bytes=(0 if device == "cpu" else 2**30) if host_bytes is None else host_bytes,
            pinned_share=pinned_share,
        )
        for device in devices
    ]
    return found, found[0] if len(found) == 1 else SpreadResidency(found, Placement(len(found)))


_NEAREST: Sequence[Tier] = ("device", "host", "disk")


def _on(versions: Sequence[Version], place: int) -> Sequence[Version]:
    return [version.on(place) for version in versions] if place else versions
