"""Handles on acquired versions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self

from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.adapters.version import Version, adapters

__all__ = ["ReferenceCounts", "Held"]


class ReferenceCounts(Protocol):
    """Residency of versions, as a handle sees it."""

    def rows(self, versions: Iterable[Version]) -> tuple[Bank, list[int]]:
        """Return the present bank and the row of each version in it."""
        ...

    def release(self, versions: Iterable[Version]) -> None:
        """Decrement the reference count of versions."""
        ...


class Held:
    """Acquired versions: each keeps a row on the device until `release`, also while the bank grows.

    A version that is replaced or retired meanwhile is dropped with the last release.

    Args:
        residency: counts the versions.
        versions: versions as they were asked for; one that occurs several times is counted once, the base never.
    """

    __slots__ = ("_counted", "_residency", "versions")

    def __init__(self, residency: ReferenceCounts, versions: Sequence[Version]) -> None:
        self._residency = residency
        self.versions = versions
        self._counted = adapters(versions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def counted(self) -> Sequence[Version]:
        """Versions that this holds; none after `release`."""
        return self._counted

    def rows(self) -> tuple[Bank, list[int]]:
        """Return the present bank and the row of each of `versions` in it; ask again before each run."""
        return self._residency.rows(self.versions)

    def release(self) -> None:
        """Release the versions; a second call does nothing."""
        counted, self._counted = self._counted, []
        if counted:
            self._residency.release(counted)
