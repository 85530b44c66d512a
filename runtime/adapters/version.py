"""Immutable, reference-counted versions of tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.runtime.adapters.bank import Rows, Shape

__all__ = ["Content", "Source", "Tier", "Version", "adapters"]

Tier = Literal["disk", "host", "device", "folded"]

_TWINS = threading.Lock()  # guards the twins of all versions


@dataclass(frozen=True, eq=False)
class Content:
    """An adapter in host memory, laid out for the graphs.

    Args:
        rows: graph input -> array with the adapter's ranks.
        sizes: output -> size of its varying axis for this adapter.
    """

    rows: Rows
    sizes: Mapping[str, int]

    @classmethod
    def joined(cls, parts: Sequence[Content]) -> Content:
        """Return one content of an adapter's parts for several components."""
        rows = {name: array for part in parts for name, array in part.rows.items()}
        return cls(rows, {name: size for part in parts for name, size in part.sizes.items()})

    @property
    def shapes(self) -> dict[str, Shape]:
        """Graph input -> shape."""
        return {name: array.shape for name, array in self.rows.items()}

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(array.nbytes for array in self.rows.values())


@dataclass(frozen=True)
class Source:
    """Where an adapter is, for `Runtime.register`.

    Attributes:
        digest: SHA-256 of its content.
        read: reads it, whenever it is needed and not in memory; called from threads of the runtime.
    """

    digest: str
    read: Callable[[], Adapter]


@dataclass(eq=False, repr=False)
class Version:
    """An immutable, reference-counted version of a task; in-flight requests finish on it.

    What changes is guarded by the lock of the `Residency` that it belongs to.  The base is a version too: row 0 of
    every bank, never counted, evicted or replaced.

    Args:
        name: name of the task or weighted set, for messages.
        known_digest: SHA-256 of the adapter's content, or a function that computes it.
        read: reads the adapter again, from disk or from memory.
    """

    name: str
    known_digest: str | Callable[[], str]
    read: Callable[[], Adapter]
    sizes: Mapping[str, int] = field(default_factory=dict)  # known once it was read
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # of its rows, likewise
    rank: int | None = None  # of the adapter, likewise
    content: Content | None = None  # while it is in host memory
    row: int | None = None  # while it is on the device
    users: int = 0
    occupied: int = 0  # users that keep it for long: sequences that are generated
    heat: float = 0.0  # see `UseHistory`
    epoch: int = 0
    pinned: bool = False
    current: bool = True  # whether the task still stands for it
    reading: threading.Lock = field(default_factory=threading.Lock)
    twins: dict[int, Version] = field(default_factory=dict)  # the same on further devices: each has a residency

    def __repr__(self) -> str:
        return repr(self.name)

    @classmethod
    def of_base(cls, sizes: Mapping[str, int]) -> Version:
        """Return the version of the base.

        Args:
            sizes: output -> size of its varying axis for the base.
        """
        return cls(BASE_TASK, "", lambda: Adapter({}), sizes, row=0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the adapter's content."""
        return self.known_digest if isinstance(self.known_digest, str) else self.known_digest()

    @property
    def is_base(self) -> bool:
        """Whether this is the base."""
        return self.row == 0

    @property
    def changes(self) -> Collection[str]:
        """Inputs of the graphs that it changes, known once it was read for any device."""
        return self.shapes or next((twin.shapes for _, twin in self.everywhere() if twin.shapes), ())

    def on(self, place: int) -> Version:
        """Return the version's counterpart on one of several devices: itself on the first, and for the base on all.

        Args:
            place: index of the device.
        """
        if not place or self.is_base:
            return self
        twin = self.twins.get(place)
        if twin is None:
            with _TWINS:  # as `everywhere`: one that is made after its task has gone knows it
                twin = self.twins.get(place)
                if twin is None:
                    twin = self.twins[place] = Version(self.name, self.known_digest, self.read, current=self.current)
        return twin

    def everywhere(self) -> list[tuple[int, Version]]:
        """Return the devices that the version was asked for on, each with the counterpart there."""
        with _TWINS:
            return [(0, self), *self.twins.items()]


def adapters(versions: Sequence[Version]) -> Sequence[Version]:
    """Return distinct versions without the base, in order."""
    if len(versions) == 1:  # as most requests have it
        return versions if versions[0].row != 0 else ()
    return [version for version in dict.fromkeys(versions) if version.row != 0]
