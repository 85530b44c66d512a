"""Thread pools for blocking work: control never waits for uploads, nor one tenant's uploads for another's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

__all__ = ["Pools", "Workers"]

P = ParamSpec("P")
R = TypeVar("R")
_Job = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """Daemon threads with round-robin queues of tenants; one tenant never occupies all threads.

    Unlike those of `ThreadPoolExecutor`, these threads are not joined at exit, however long a disk takes.

    Args:
        name: prefix of the threads' names.
        threads: maximum number of threads, which start on demand.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._most = threads
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._running: Counter[str] = Counter()
        self._queued = self._threads = self._idle = 0
        self._closed = False

    async def run(self, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Run work of the server, and return the result."""
        return await self.run_for("", work, *args, **options)

    async def run_for(self, tenant: str, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Run work of a tenant, and return the result; cancelling removes queued work."""
        return await asyncio.wrap_future(self._submit(tenant, partial(work, *args, **options)))

    def close(self, timeout: float) -> None:
        """Cancel queued work, and wait at most `timeout` seconds for running work."""
        until = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            for jobs in self._waiting.values():
                for future, _ in jobs:
                    future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
            while self._running and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _submit(self, tenant: str, work: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"threads {self._name} are closed")
            self._waiting.setdefault(tenant, deque()).append((future, work))
            self._queued += 1
            if self._queued > self._idle and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
            self._changed.notify()
        return future

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            tenant = taken[0]
            _settle(*taken[1])
            del taken  # frees the memory of the work before waiting for the next
            with self._changed:
                self._running[tenant] -= 1
                if not self._running[tenant]:
                    del self._running[tenant]
                self._changed.notify_all()

    def _take(self) -> tuple[str, _Job] | None:
        with self._changed:
            self._idle += 1
            try:
                while not self._closed:
                    for tenant, jobs in self._waiting.items():
                        if tenant and self._running[tenant] >= max(1, self._most - 1):
                            continue
                        job = jobs.popleft()
                        self._queued -= 1
                        self._waiting.move_to_end(tenant)
                        if not jobs:
                            del self._waiting[tenant]
                        self._running[tenant] += 1
                        return tenant, job
                    self._changed.wait()
            finally:
                self._idle -= 1
        return None


@dataclass(frozen=True)
class Pools:
    """Thread pools of one server.

    Attributes:
        control: keys, tenants, the audit log and metrics.
        changes: aliases, deletion and publishing, which wait for a probe of the same task.
        uploads: files of uploads, registration with its probe, and pins.
    """

    control: Workers = field(default_factory=lambda: Workers("tpeft-control", 4))
    changes: Workers = field(default_factory=lambda: Workers("tpeft-changes", 4))
    uploads: Workers = field(default_factory=lambda: Workers("tpeft-uploads", 4))

    def close(self, timeout: float = 5.0) -> None:
        """Wait at most `timeout` seconds for running work, before the registry is closed."""
        until = time.monotonic() + timeout
        for workers in (self.uploads, self.changes, self.control):
            workers.close(max(0.0, until - time.monotonic()))


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = work()
    except BaseException as error:
        future.set_exception(error)
        del future, work  # breaks the cycle of error and frame, which would keep memory until a garbage collection
    else:
        future.set_result(found)
