"""Pool of readers: round-robin over tenants, with bounded queues; readers that end are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import QuotaExceeded, TpeftError, Unavailable
from tpeft_deploy.runtime.server.isolation import reader
from tpeft_deploy.runtime.server.isolation.outcomes import (
    Upload,
    closing,
    collect,
    crashed,
    header_bytes,
    no_process,
)
from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits
from tpeft_deploy.runtime.server.isolation.process import Outcome, Process
from tpeft_deploy.runtime.server.operations.pools import Workers

__all__ = ["Direct", "Pool", "Reader"]

_log = logging.getLogger("tpeft_deploy.server")


class Reader(Protocol):
    """Parser of uploads."""

    def check_room(self, tenant: str) -> None:
        """Raise if the queue has no room for an upload, before it is received.

        Raises:
            Unavailable, QuotaExceeded: too many uploads are queued.
        """

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """Parse an upload and fit its adapter to the bundle.

        Args:
            tenant: tenant of the upload.
            directory: directory of its files.
            of: name of the upload in messages.

        Raises:
            ProtocolError, AdapterError: the upload is invalid.
            Unavailable, QuotaExceeded: too many uploads are queued.
        """


class Direct:
    """Reader in this process, without limits: for a service embedded in another program.

    Args:
        bundle: bundle that adapters must fit.
        workers: threads for parsing (default: separate ones).
    """

    def __init__(self, bundle: Bundle, workers: Workers | None = None) -> None:
        self._bundle = bundle
        self._workers = workers or Workers("tpeft-read", 2)

    def check_room(self, tenant: str) -> None:
        """Accept every upload."""

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """Parse an upload."""
        return await self._workers.run_for(tenant, self._read, directory, of)

    def _read(self, directory: Path, of: str) -> Upload:
        found = reader.read(self._bundle, directory, of)
        return Upload(found, found.to_bytes())


@dataclass(eq=False)
class _Job:
    tenant: str
    directory: Path
    of: str
    future: Future[Upload] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards the fields below
    process: Process | None = None
    abandoned: bool = False


class Pool:
    """Reader that parses uploads in child processes.

    With several readers, a tenant never occupies all of them, so that an upload of another tenant always finds one.

    Args:
        bundle: bundle that adapters must fit.
        limits: limits of the pool and of each upload.
        program: program of the child processes.
        observe: called with the outcome of each upload's process, in a thread of the pool.
    """

    def __init__(
        self,
        bundle: Bundle,
        limits: ParsingLimits | None = None,
        *,
        program: Path = Path(reader.__file__),
        observe: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self._path = bundle.path.resolve()
        self._header_bytes = sum(header_bytes(part.manifest) for part in bundle.components.values())
        self._limits = limits or ParsingLimits()
        self._program = program
        self._observe = observe
        self._lock = threading.Lock()  # guards the fields below
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()  # in round-robin order
        self._running: Counter[str] = Counter()
        self._processes: set[Process] = set()
        self._idle: list[Process] = []
        self._closed = False
        self._threads = ThreadPoolExecutor(self._limits.readers, "upload-reader")
        for _ in range(self._limits.readers):
            self._threads.submit(self._warm_up)

    def pids(self) -> list[int]:
        """Process ids of the readers."""
        with self._lock:
            return [process.pid for process in self._processes]

    def check_room(self, tenant: str) -> None:
        """Raise if the queue has no room for an upload, before it is received."""
        with self._lock:
            self._check_room(tenant)

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """Parse an upload; cancelling stops its process."""
        job = _Job(tenant, directory, of)
        with self._lock:
            self._check_room(tenant)
            self._waiting.setdefault(tenant, deque()).append(job)
            self._dispatch()
        waiter = asyncio.wrap_future(job.future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            self._abandon(job)
            await asyncio.wait([waiter])  # the process may write to the directory until it ends
            with contextlib.suppress(TpeftError, OSError):
                waiter.result()
            raise

    def close(self) -> None:
        """Terminate all readers; queued uploads are refused."""
        with self._lock:
            self._closed = True
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            for process in self._processes:
                process.kill()
        for job in waiting:
            job.future.set_exception(closing(job.of))
        self._threads.shutdown()
        for process in list(self._processes):
            self._drop(process)

    def _check_room(self, tenant: str) -> None:
        doing, fix = "take an upload", "Send it again later."
        own = len(self._waiting.get(tenant, ()))
        if self._closed:
            raise closing("an upload")
        if own >= self._limits.tenant_waiting:
            raise QuotaExceeded(
                doing,
                expected=f"at most {self._limits.tenant_waiting} uploads of one tenant waiting",
                got="one more",
                fix=fix,
                retry_after=1.0,
            )
        if sum(map(len, self._waiting.values())) >= self._limits.waiting:
            raise Unavailable(
                doing, expected=f"at most {self._limits.waiting} uploads waiting", got="one more", fix=fix
            )

    def _dispatch(self) -> None:
        """Dispatch queued uploads to free readers."""
        while self._running.total() < self._limits.readers and (job := self._take()) is not None:
            self._running[job.tenant] += 1
            self._threads.submit(self._run, job)

    def _take(self) -> _Job | None:
        """Dequeue the next upload of the first tenant that may occupy another reader (all but one)."""
        most = max(1, self._limits.readers - 1)
        tenant = next((tenant for tenant in self._waiting if self._running[tenant] < most), None)
        if tenant is None:
            return None
        jobs = self._waiting.pop(tenant)
        job = jobs.popleft()
        if jobs:
            self._waiting[tenant] = jobs  # to the end of the round-robin order
        return job

    def _run(self, job: _Job) -> None:
        try:
            found = self._read(job)
        except BaseException as error:
            self._end(job)
            job.future.set_exception(error)
        else:
            self._end(job)
            job.future.set_result(found)

    def _end(self, job: _Job) -> None:
        with self._lock:
            self._running[job.tenant] -= 1
            self._running = +self._running
            self._dispatch()

    def _read(self, job: _Job) -> Upload:
        process = self._ready(job.of)
        with job.lock:
            if job.abandoned:
                self._give_back(process)
                raise closing(job.of)
            job.process = process
        outcome = process.ask(job.directory, job.of, self._limits)
        with job.lock:
            job.process = None
        if outcome is None:
            self._drop(process)
            if self._closed or job.abandoned:
                raise closing(job.of)
            raise crashed(job.of, "its process ended")
        self._give_back(process)
        self._observe(outcome)
        return collect(job.directory, job.of, outcome, self._limits, self._header_bytes)

    def _abandon(self, job: _Job) -> None:
        with self._lock:
            jobs = self._waiting.get(job.tenant, deque())
            waits = job in jobs
            if waits:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.tenant]
        if waits:
            job.future.set_exception(closing(job.of))
            return
        with job.lock:
            job.abandoned = True
            if job.process is not None:
                job.process.abandon()

    def _ready(self, of: str) -> Process:
        """Return an idle reader, or start a new one."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is not None and process.alive():
            return process
        if process is not None:
            self._drop(process)
        return self._start(of)

    def _start(self, of: str) -> Process:
        try:
            process = Process(self._path, self._program)
        except OSError as error:
            _log.error("cannot start a reader of uploads: %s", error)
            raise no_process(of) from None
        with self._lock:
            closed = self._closed
            self._processes.add(process)
        if closed or not process.wait_ready():
            self._drop(process)
            if self._closed:
                raise closing(of)
            _log.error("a reader of uploads did not start")
            raise no_process(of)
        return process

    def _warm_up(self) -> None:
        with contextlib.suppress(Unavailable):  # logged; the next upload tries again
            self._give_back(self._start("an upload"))

    def _give_back(self, process: Process) -> None:
        with self._lock:
            self._idle.append(process)

    def _drop(self, process: Process) -> None:
        with self._lock:
            self._processes.discard(process)
        process.close()
