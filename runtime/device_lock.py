"""Recording a CUDA graph while no other thread touches the device.

While one thread records, CUDA refuses allocations, frees, synchronising copies and module loads from every thread of
the process, for any device, and each refused call spoils the recording.  So all that may do so holds one lock of the
process shared, and a recording holds it exclusively.  The CPU takes no lock.

What is let go is freed wherever the last reference goes, which may be any thread, in the middle of a garbage
collection: `free_safely` puts off a free that falls into a recording until the recording ends.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["DEVICE", "DeviceLock", "free_safely", "opening", "place", "using"]


class _Holds(threading.local):
    """What a thread holds: how often, and whether its outermost hold may last long."""

    depth = 0
    long = False


class DeviceLock:
    """A lock that many threads share, or one thread holds for a recording.

    Fair by turns: once a recording waits, threads that come later wait until it is over; once it is over, those that
    waited go before the next recording.  Neither side starves.

    Reentrant: a thread that holds the lock, shared or exclusively, may take it shared again at once, as garbage
    collection does unasked.  A thread that shares the lock must not ask to record: it would wait for itself.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._holds = _Holds()
        self._sharing = 0  # threads that share the lock, and of them those that may take long
        self._long = 0
        self._recording = False
        self._recorders = 0  # that wait
        self._waiting = 0  # threads that wait to share the lock, and of them those that go before the next recording
        self._first = 0
        self._ended = 0  # recordings so far
        self._unfreed: deque[dict[str, Any]] = deque()
        self._shared, self._shared_long = _Shared(self, long=False), _Shared(self, long=True)

    def shared(self) -> AbstractContextManager[None]:
        """Hold the lock beside others, for about the length of a run."""
        return self._shared

    def shared_long(self) -> AbstractContextManager[None]:
        """Hold the lock beside others for longer, as opening a session does."""
        return self._shared_long

    @contextlib.contextmanager
    def recording(self, *, wait: bool) -> Iterator[bool]:
        """Hold the lock alone.

        Args:
            wait: whether to wait for threads that may take long; threads that come meanwhile wait with the recorder.

        Returns:
            Whether the lock is held: without `wait` it is not while others hold it for long.

        Raises:
            RuntimeError: the thread holds the lock already.
        """
        if self._holds.depth:
            raise RuntimeError("a recording by a thread that holds the device lock, which would wait for itself")
        granted = self._begin(wait)
        try:
            yield granted
        finally:
            if granted:
                self._end()

    def free(self, things: dict[str, Any]) -> None:
        """Empty a dictionary, at once or as soon as no recording runs; never waits."""
        self._unfreed.append(things)
        self._free_all()

    def _begin(self, wait: bool) -> bool:
        with self._mutex:
            if self._long and not wait:
                return False
            self._recorders += 1
            try:
                while self._recording or self._sharing or self._first:
                    self._changed.wait()
            finally:
                self._recorders -= 1
                self._changed.notify_all()  # else threads that waited for it would wait on if it was interrupted
            self._recording = True
        self._holds.depth = 1
        return True

    def _end(self) -> None:
        self._holds.depth = 0
        with self._mutex:
            self._recording = False
            self._ended += 1
            self._first = self._waiting
            self._changed.notify_all()
        self._free_all()

    def _share(self, long: bool) -> None:
        holds = self._holds
        if not holds.depth:
            with self._mutex:
                if self._recording or self._recorders:
                    self._await_turn()
                self._sharing += 1
                self._long += long
            holds.long = long
        holds.depth += 1

    def _await_turn(self) -> None:
        came = self._ended
        self._waiting += 1
        try:
            while self._recording or (self._recorders and self._ended == came):
                self._changed.wait()
        finally:
            self._waiting -= 1
            self._first = max(0, self._first - 1)
            self._changed.notify_all()

    def _unshare(self) -> None:
        holds = self._holds
        holds.depth -= 1
        if holds.depth:
            return
        with self._mutex:
            self._sharing -= 1
            self._long -= holds.long
            if self._recorders and not self._sharing:
                self._changed.notify_all()
        if self._unfreed:
            self._free_all()

    def _free_all(self) -> None:
        while self._unfreed and self._try_share():
            try:
                with contextlib.suppress(IndexError):  # another thread was faster
                    while self._unfreed:
                        self._unfreed.popleft().clear()
            finally:
                self._unshare()

    def _try_share(self) -> bool:
        holds = self._holds
        if not holds.depth:
            # A collection may interrupt this very thread where it has the mutex.
            if not self._mutex.acquire(blocking=False):
                return False
            try:
                if self._recording:
                    return False
                self._sharing += 1
            finally:
                self._mutex.release()
            holds.long = False
        holds.depth += 1
        return True


class _Shared:
    """A context manager without state, one for all threads."""

    def __init__(self, lock: DeviceLock, *, long: bool) -> None:
        self._lock, self._long = lock, long

    def __enter__(self) -> None:
        self._lock._share(self._long)

    def __exit__(self, *_: object) -> None:
        self._lock._unshare()


DEVICE = DeviceLock()
_NOTHING = contextlib.nullcontext()


def place(device: str) -> tuple[str, int]:
    """A device's name and number in ONNX Runtime, of "cpu", "cuda" or "cuda:1"."""
    name, _, number = device.partition(":")
    return name, int(number or 0)


def using(device: str) -> AbstractContextManager[None]:
    """Held by whatever runs, allocates, copies or frees on a device; for the CPU it is nothing."""
    return _NOTHING if device == "cpu" else DEVICE.shared()


def opening(device: str) -> AbstractContextManager[None]:
    """Held while a session opens or closes, which no recording waits for without need."""
    return _NOTHING if device == "cpu" else DEVICE.shared_long()


def free_safely(owner: object) -> None:
    """See that what an object holds is freed only while nothing records.

    Args:
        owner: a session or binding on CUDA; its attributes outlive it until no recording runs.
    """
    weakref.finalize(owner, DEVICE.free, vars(owner)).atexit = False
