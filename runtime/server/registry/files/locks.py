"""One lock per key, for as long as somebody holds or awaits it."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

__all__ = ["KeyedLocks"]


class KeyedLocks:
    """Locks that are made when first asked for and dropped with their last user: memory follows use, not keys seen."""

    def __init__(self) -> None:
        self._state = threading.Lock()  # guards the mapping and its counts, and is never held while waiting
        self._used: dict[Hashable, tuple[threading.Lock, int]] = {}  # key -> its lock, and how many hold or await it

    def __len__(self) -> int:
        return len(self._used)

    def users(self, key: Hashable) -> int:
        """Number of threads that hold or await the lock of `key`."""
        with self._state:
            return self._used[key][1] if key in self._used else 0

    @contextmanager
    def hold(self, key: Hashable) -> Iterator[None]:
        """Hold the lock of `key`; no other key waits for it."""
        with self._state:
            lock, users = self._used.get(key, (threading.Lock(), 0))
            self._used[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._state:
                lock, users = self._used.pop(key)
                if users > 1:
                    self._used[key] = lock, users - 1
