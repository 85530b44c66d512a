"""Handles on acquired versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self

from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.adapters.version import Version, adapters

__all__ = ["Held"]


class Held:
    """Acquired versions: each keeps a row on the device until `release`, also while the bank grows.

    A version that is replaced or retired meanwhile is dropped with the last release.

    Args:
        versions: versions as they were asked for; one that occurs several times is counted once, the base never.
        rows: versions -> the present bank and their rows in it.
        release: decrements the reference count of versions.
        places: indices of the devices that they are on, where there are several.

    Attributes:
        counted: versions that this holds; none after `release`.
    """

    __slots__ = ("_release", "_rows", "counted", "places", "versions")

    def __init__(
        self,
        versions: Sequence[Version],
        rows: Callable[[Iterable[Version]], tuple[Bank, list[int]]],
        release: Callable[[Iterable[Version]], None],
        places: Sequence[int] = (0,),
    ) -> None:
        self.versions = versions
        self.places = places
        self.counted: Sequence[Version] = adapters(versions)
        self._rows = rows
        self._release = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def rows(self) -> tuple[Bank, list[int]]:
        """Return the present bank and the row of each of `versions` in it; ask again before each run."""
        return self._rows(self.versions)

    def release(self) -> None:
        """Release the versions; a second call does nothing."""
        counted, self.counted = self.counted, ()
        if counted:
            self._release(counted)
