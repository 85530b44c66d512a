"""Locks by key."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

__all__ = ["KeyedLocks"]


class KeyedLocks:
    """Locks created on first use and dropped after the last, so that memory does not grow with the keys."""

    def __init__(self) -> None:
        self._state = threading.Lock()  # guards the mapping, and is never held while waiting
        self._used: dict[Hashable, tuple[threading.Lock, int]] = {}  # key -> lock and its users

    def __len__(self) -> int:
        return len(self._used)

    def users(self, key: Hashable) -> int:
        """Number of threads that hold or await the lock of `key`."""
        with self._state:
            return self._used[key][1] if key in self._used else 0

    @contextmanager
    def hold(self, key: Hashable) -> Iterator[None]:
        """Hold the lock of `key`; other keys are not blocked."""
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
