"""Values cached from the database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Latest"]

T = TypeVar("T")


class Latest(Generic[T]):
    """Cached value that is read without a lock and never replaced by an older one.

    Two threads may read the database before and after a change and store their values in reverse order: a revoked key
    would become valid again.

    Args:
        value: initial value.
        observe: called with each new value, in their order.
    """

    def __init__(self, value: T, observe: Callable[[T], None] = lambda _: None) -> None:
        self.value = value
        self._observe = observe
        self._changes = -1
        self._lock = threading.Lock()

    def put(self, changes: int, value: T) -> None:
        """Replace the value, unless the cached one is newer.

        Args:
            changes: change counter of the database when the value was read.
            value: new value.
        """
        with self._lock:
            if changes >= self._changes:
                self._changes, self.value = changes, value
                self._observe(value)
