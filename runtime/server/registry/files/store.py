"""Protocol of a store of adapters' files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["AdapterStore", "Referred"]

Referred = Callable[[], AbstractContextManager[Set[str]]]
"""Function that returns a context with the referenced digests; none is added before the context ends."""


class AdapterStore(Protocol):
    """Store of immutable files, named by their SHA-256; `Blobs` has the documentation of the methods."""

    def write(self, data: bytes) -> str:
        """Store bytes durably and return their digest."""
        ...

    def read(self, digest: str, *, of: str) -> bytes:
        """Read the bytes of a digest, verified."""
        ...

    def any(self) -> bool:
        """Whether the store has any files."""
        ...

    def pending(self, data: bytes) -> AbstractContextManager[str]:
        """Store bytes that no sweep removes before the block ends."""
        ...

    def release(self, digests: Iterable[str]) -> None:
        """Record dropped references."""
        ...

    def discard(self, digest: str, referred: Referred) -> None:
        """Remove the file of a refused upload, unless it is needed otherwise."""
        ...

    def sweep(self, referred: Referred, *, grace: float) -> int:
        """Remove unreferenced files and return their number."""
        ...

    def clean(self, referred: Referred) -> None:
        """Remove what a killed server left, at the start."""
        ...
