"""Residency of adapters: on disk, in host memory, or in a row on the device; eviction where memory is short.

Choosing among resident adapters takes one short lock.  Reading, laying out and writing happen outside it, so that
runs of resident tasks go on meanwhile.  A row is given to another adapter only when its reference count is zero.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakValueDictionary

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import CapacityError, RunError
from tpeft_deploy.runtime.adapters.bank import Bank, Layout, Shape, row_bytes, widened
from tpeft_deploy.runtime.adapters.eviction import UseHistory
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.version import Content, Tier, Version

__all__ = ["Residency"]

_FIRST_ROWS = 8
_FIRST_BYTES = 2**30
_MOST_FIRST_ROWS = 2**14  # a list of the free ones is kept, and rows of small adapters are a few hundred bytes


class _Shapes(dict[str, Shape]):
    """The shapes of a version's rows: a dict that can be referred to weakly."""


class Residency:
    """The bank and its residents, under byte budgets; safe to use from several threads.

    Args:
        layout: layout of the bundle's banked graph.
        lay_out: an adapter as rows; raises where it does not fit the bundle.
        device: "cpu", "cuda" or "cuda:1".
        device_bytes: bytes for the bank; while it is replaced by a larger one, both live.
        host_bytes: bytes for copies of adapters in host memory, so that they return to the device without being
            read again.
        pinned_share: part of the rows that the budget has room for which pinned versions may take.
    """

    def __init__(
        self,
        layout: Layout,
        lay_out: Callable[[Adapter], Content],
        device: str,
        *,
        device_bytes: int,
        host_bytes: int,
        pinned_share: float = 1.0,
    ) -> None:
        self._layout = layout
        self._lay_out = lay_out
        self._device = device
        self._device_bytes = device_bytes
        self._host_bytes = host_bytes
        self._pinned_share = pinned_share
        self._writer = threading.Lock()  # held by the one that fills rows or replaces the bank
        self._state = threading.Lock()  # guards all that follows, and what changes in a version
        self._released = threading.Condition(self._state)  # notified where the writer waits for a row
        self._awaited = False
        self._bank = Bank.allocate(layout, layout.shapes, 1, device)
        self._free: list[int] = []
        self._resident: dict[Version, None] = {}  # those on a row, the least recently used first
        self._pins: dict[Version, None] = {}  # those that are pinned
        self._copies: dict[Version, int] = {}  # those in host memory and their bytes, likewise
        self._copied = 0
        self._written = 0
        self._uses = UseHistory()
        self._leaving: Version | None = None  # eviction victim: new requests may not acquire it
        if self._bank.nbytes > device_bytes:
            raise CapacityError(
                "open the bank",
                expected=f"room for the base's row, {self._bank.nbytes:,} bytes",
                got=f"a budget of {device_bytes:,} bytes",
                fix="Give the runtime more device_bytes.",
            )
        # One object for all of the same ranks, as long as one of them is known.
        self._alike: WeakValueDictionary[frozenset[tuple[str, Shape]], _Shapes] = WeakValueDictionary()
        self._closed = False

    def acquire(self, versions: Sequence[Version], *, new: bool = False, everywhere: bool = True) -> Held:
        """Bring versions to the device and acquire them.

        Args:
            versions: versions, the base among them or not.
            new: as for `try_acquire`.
            everywhere: whether on every device, where there are several; there is one here.

        Raises:
            AdapterError, BundleError: one cannot be read or does not fit.
            CapacityError: they do not fit on the device together, however long one waits.
        """
        held = self.try_acquire(versions, new=new)
        if held is not None:
            return held
        held = Held(versions, self.rows, self.release)
        wanted = held.counted
        contents = {version: self._content(version) for version in wanted if version.row is None}
        # One at a time, and only the one that holds no row yet: two that wait for each other's would wait forever.
        with self._writer:
            with self._state:
                self._count(wanted)
            try:
                for version in wanted:
                    if version.row is None:
                        self._place(version, contents.get(version) or self._content(version), wanted)
            except BaseException:
                held.release()
                raise
        return held

    def try_acquire(self, versions: Sequence[Version], *, new: bool = False) -> Held | None:
        """Acquire versions if all are on the device already; never waits.

        Args:
            versions: versions, the base among them or not.
            new: whether the caller holds none of them yet, so that it may have to wait for an eviction victim.
        """
        held = Held(versions, self.rows, self.release)
        wanted = held.counted
        if wanted:
            with self._state:
                for version in wanted:
                    if version.row is None or (new and version is self._leaving):
                        return None
                self._count(wanted)
        return held

    def release(self, versions: Iterable[Version]) -> None:
        """Decrement the reference count of versions; called by `Held.release`."""
        with self._state:
            for version in versions:
                version.users -= 1
                if not version.users and not version.current:
                    self._forget(version)
            self._notify()

    def rows(self, versions: Iterable[Version], component: str = "") -> tuple[Bank, list[int]]:
        """Return the present bank, or that of one of several components, and the rows of acquired versions in it."""
        with self._state:
            bank = self._bank.parts[component] if component else self._bank
            return bank, [self._row(version) for version in versions]

    def retire(self, version: Version) -> None:
        """Drop a version that no task stands for any more, now or with its last release."""
        with self._state:
            version.current = version.pinned = False
            self._pins.pop(version, None)
            if not version.users:
                self._forget(version)
            self._notify()

    def pin(self, version: Version, pinned: bool) -> None:
        """Keep a version on its row once it has one, or let it go again when others need the room.

        Raises:
            CapacityError: pinned versions would take more than their part of the rows.
        """
        with self._state:
            if pinned and not version.pinned and self._pinned_share < 1:
                self._check_pinned(version)
            version.pinned = pinned
            if pinned:
                self._pins[version] = None
            else:
                self._pins.pop(version, None)
            self._notify()

    def occupy(self, version: Version, change: int) -> None:
        """Count users of an acquired version that keep it for long, so that no other version waits for its row."""
        with self._state:
            version.occupied += change
            self._notify()

    def tier(self, version: Version) -> Tier:
        """Where a version is."""
        with self._state:
            if version.row is not None:
                return "device"
            return "disk" if version.content is None else "host"

    @property
    def full(self) -> bool:
        """Whether one more adapter of the present ranks would push another out."""
        with self._state:
            return not self._free and (self._bank.rows + 1) * self._bank.row_bytes > self._device_bytes

    def usage(self) -> dict[str, int]:
        """Bytes on the device and in host memory; rows taken, there, and written so far, without the base's.

        `device_bytes` is the whole bank: `device_adapter_bytes` that the adapters on it hold, and
        `device_reserved_bytes` beside them: the base's row, what pads rows to the largest ranks, and rows without an
        adapter, which on the CPU take no memory until one is written.
        """
        with self._state:
            alike = Counter(id(version.shapes) for version in self._resident)
            shapes = {id(version.shapes): version.shapes for version in self._resident}
            device, copied, taken, rows = self._bank.nbytes, self._copied, len(self._resident), self._bank.rows - 1
            written = self._written
        adapters = sum(count * row_bytes(self._layout, shapes[key]) for key, count in alike.items())
        return {
            "device_bytes": device,
            "device_adapter_bytes": adapters,
            "device_reserved_bytes": device - adapters,
            "host_bytes": copied,
            "rows_taken": taken,
            "rows": rows,
            "rows_written": written,
        }

    def close(self) -> None:
        """End all waits for rows: holders of rows may be waiting for the closing to end."""
        with self._state:
            self._closed = True
            self._notify()

    def _notify(self) -> None:
        if self._awaited:  # a notification that none awaits costs as much as the rest of a request here
            self._awaited = False
            self._released.notify_all()

    def _count(self, versions: Iterable[Version]) -> None:
        for version in versions:
            version.users += 1
            self._uses.add(version, len(self._resident))
            if version.row is not None:
                self._resident[version] = self._resident.pop(version)
            if version.content is not None:
                self._copies[version] = self._copies.pop(version)

    def _row(self, version: Version) -> int:
        if version.row is None or not (version.users or version.is_base):
            raise RuntimeError(f"{version.name!r} is asked for its row without being acquired")
        return version.row

    def _content(self, version: Version) -> Content:
        content = version.content
        if content is not None:
            return content
        with version.reading:  # several requests for one cold task read it once
            content = version.content
            if content is None:
                adapter = version.read()
                content = self._lay_out(adapter)
                shapes = _Shapes(content.shapes)
                with self._state:
                    version.sizes, version.rank = content.sizes, adapter.rank
                    version.shapes = self._alike.setdefault(frozenset(shapes.items()), shapes)
                    self._keep(version, content)
        return content

    def _keep(self, version: Version, content: Content) -> None:
        # A version that is retired by now may have no release left to forget it.
        if content.nbytes > self._host_bytes or not version.current:
            return
        version.content = content
        self._copies[version] = content.nbytes
        self._copied += content.nbytes
        while self._copied > self._host_bytes:
            self._drop(next(iter(self._copies)))

    def _drop(self, version: Version) -> None:
        self._copied -= self._copies.pop(version, 0)
        version.content = None

    def _forget(self, version: Version) -> None:
        self._drop(version)
        if version.row is not None:
            self._evict(version)

    def _evict(self, version: Version) -> None:
        if version.row is None:
            raise RuntimeError(f"{version.name!r} is on no row")
        self._free.append(version.row)
        version.row = None
        del self._resident[version]

    def _place(self, version: Version, content: Content, wanted: Sequence[Version]) -> None:
        """Write a version to a row; only the holder of the writer's lock comes here."""
        while (row := self._make_room(version, wanted)) is None:
            self._replace_bank(version)
        self._bank.write(row, content.rows)
        with self._state:
            self._free.remove(row)
            version.row = row
            self._written += 1
            self._resident[version] = None

    def _make_room(self, version: Version, wanted: Sequence[Version]) -> int | None:
        """A free row that holds a version, once there is one; None: the bank has to be replaced."""
        with self._state:
            try:
                while True:
                    if self._free and widened(self._bank.shapes, [version.shapes]) == self._bank.shapes:
                        return self._free[-1]
                    staying = {*wanted, *self._kept(version)} - {version}
                    self._check_budget(version, staying)
                    size = row_bytes(self._layout, self._shapes([*self._resident, version]))
                    if (len(self._resident) + 2) * size <= self._device_bytes:  # the base, all residents, and this one
                        return None
                    self._free_a_row(version, [other for other in self._resident if other not in staying])
            finally:
                self._leaving = None

    def _free_a_row(self, version: Version, others: Sequence[Version]) -> None:
        """Evict one of others with a reference count of zero, or wait a while for one."""
        victim = self._uses.victim(other for other in others if not other.users)
        if victim is not None:
            self._evict(victim)
        elif self._closed:
            raise RunError(f"bring {version.name!r} to the device", problem="the runtime is closed")
        else:
            # Runs in flight release their rows, and no other writer may take them.  Versions that are asked for without
            # a pause would never be free: so the one with the smallest count becomes the eviction victim.
            soon_free = [other for other in others if not other.occupied]
            if not soon_free:
                raise _all_occupied(version, len(others))
            if self._leaving not in soon_free:
                self._leaving = min(soon_free, key=lambda other: other.users)
            self._awaited = True
            self._released.wait()

    def _check_budget(self, version: Version, staying: Iterable[Version]) -> None:
        together = [*staying, version]
        size = row_bytes(self._layout, self._shapes(together))
        if (len(together) + 1) * size > self._device_bytes:
            pinned = sum(other.pinned for other in together)
            raise CapacityError(
                f"bring {version.name!r} to the device",
                expected=f"room for it, the base and {len(together) - 1} that have to stay ({pinned} pinned), "
                f"{(len(together) + 1) * size:,} bytes",
                got=f"a budget of {self._device_bytes:,} bytes",
                fix="Give the runtime more device_bytes, unpin tasks, or ask for fewer tasks in one batch.",
            )

    def _check_pinned(self, version: Version) -> None:
        rows = self._rows_for([*self._pins, version])
        if len(self._pins) >= int(self._pinned_share * rows):
            raise CapacityError(
                f"pin {version.name!r}",
                expected=f"at most {int(self._pinned_share * rows)} of {rows} rows pinned",
                got=f"{len(self._pins)} already",
                fix="Unpin others, or give the runtime more device_bytes.",
            )

    def _kept(self, version: Version) -> list[Version]:
        """The pinned versions that keep their rows when one more needs one.

        Beside a version of larger ranks there are fewer rows: then those used longest ago give way as others do.
        """
        pinned = [other for other in self._resident if other.pinned]
        if self._pinned_share >= 1:
            return pinned
        most = int(self._pinned_share * self._rows_for([*pinned, version]))
        return pinned[max(0, len(pinned) - most) :]

    def _rows_for(self, versions: Iterable[Version]) -> int:
        """How many rows the budget has, beside the base's, that each hold any of these."""
        return self._device_bytes // row_bytes(self._layout, self._shapes(versions)) - 1

    def _shapes(self, versions: Iterable[Version]) -> dict[str, Shape]:
        distinct = {id(version.shapes): version.shapes for version in versions}
        return self._layout.widest(distinct.values())

    def _replace_bank(self, version: Version) -> None:
        """A bank with more, wider or narrower rows, with all residents in it."""
        with self._state:
            staying = {other: row for row, other in enumerate(self._resident, 1)}
            moves = {other.row: row for other, row in staying.items() if other.row is not None}
            shapes = self._shapes([*staying, version])
        size = row_bytes(self._layout, shapes)
        most = self._device_bytes // size
        rows = min(most, max(self._first_rows(size), 2 * (len(staying) + 2)))
        bank = Bank.allocate(self._layout, shapes, rows, self._device, old=self._bank, moves=moves)
        with self._state:
            self._bank = bank
            for other, row in staying.items():
                if other.row is not None:  # it may have been forgotten meanwhile
                    other.row = row
            taken = {other.row for other in self._resident}
            self._free = [row for row in range(rows - 1, 0, -1) if row not in taken]

    def _first_rows(self, size: int) -> int:
        # On the CPU rows without an adapter cost nothing, so the bank need not be replaced to get them.
        return min(_FIRST_BYTES // size, _MOST_FIRST_ROWS) if self._device == "cpu" else _FIRST_ROWS


def _all_occupied(version: Version, count: int) -> CapacityError:
    return CapacityError(
        f"bring {version.name!r} to the device",
        expected="a row that will soon be free",
        got=f"{count} that sequences are generated on" if count else "none that may be given up",
        fix="Send it again later, or give the runtime more device_bytes.",
    )
