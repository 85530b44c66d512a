"""Protocol of a store of adapters' files."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["AdapterStore", "PendingDigests", "Referred"]

Referred = Callable[[], AbstractContextManager[Set[str]]]
"""Function that returns a context with the referenced digests; none is added before the context ends."""


class PendingDigests:
    """Digests that no sweep removes: being written, or not referenced yet.

    Args:
        lock: lock of the store, which sweeps hold too.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __contains__(self, digest: str) -> bool:
        return digest in self._counts

    @contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """Keep a digest during the block."""
        with self._lock:
            self._counts[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._counts[digest] -= 1
                self._counts = +self._counts


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
