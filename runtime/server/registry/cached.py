"""What was read of the database last."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

__all__ = ["Latest"]

T = TypeVar("T")


class Latest(Generic[T]):
    """A value that many read without waiting, and that is never replaced by one that was read earlier.

    Two threads may read the database, before and after a change, and come here in the other order: a key that was
    revoked just now would be good again.

    Args:
        value: the first.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self._changes = -1
        self._lock = threading.Lock()

    def put(self, changes: int, value: T) -> None:
        """Replace the value.

        Args:
            changes: how many changes the database had seen when it was read.
            value: the new one.
        """
        with self._lock:
            if changes >= self._changes:
                self._changes, self.value = changes, value
