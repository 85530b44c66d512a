"""A few readers for all tenants: round-robin, with bounded waiting, replaced when they end."""

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
from tpeft_deploy.runtime.server.isolation.limits import Limits
from tpeft_deploy.runtime.server.isolation.outcomes import (
    Upload,
    closing,
    collect,
    crashed,
    header_bytes,
    no_process,
)
from tpeft_deploy.runtime.server.isolation.process import Outcome, Process
from tpeft_deploy.runtime.server.operations.pools import Workers

__all__ = ["Direct", "Pool", "Reader"]

_log = logging.getLogger("tpeft_deploy.server")


class Reader(Protocol):
    """Reads the files of uploads."""

    def check_room(self, tenant: str) -> None:
        """Refuse an upload that could not wait, before it is received.

        Raises:
            Unavailable, QuotaExceeded: too many uploads wait.
        """

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """The adapter of an upload, fitted to the bundle.

        Args:
            tenant: which sends it.
            directory: its files.
            of: name for it in messages.

        Raises:
            ProtocolError, AdapterError: it is refused.
            Unavailable, QuotaExceeded: too many uploads wait.
        """


class Direct:
    """Reads in this process, without limits: for a service that is part of another program.

    Args:
        bundle: what adapters have to fit.
        workers: threads to read in; some of this object by default.
    """

    def __init__(self, bundle: Bundle, workers: Workers | None = None) -> None:
        self._bundle = bundle
        self._workers = workers or Workers("tpeft-read", 2)

    def check_room(self, tenant: str) -> None:
        """Refuse nothing."""

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """The adapter of an upload."""
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
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the two below
    process: Process | None = None
    abandoned: bool = False


class Pool:
    """Reads uploads in child processes.

    A tenant never holds all readers where there are several, so that an upload of another always finds one.

    Args:
        bundle: what adapters have to fit.
        limits: of the pool and of each upload.
        program: what the children run.
        observe: called with how the process of each upload ended, in a thread of the pool.
    """

    def __init__(
        self,
        bundle: Bundle,
        limits: Limits | None = None,
        *,
        program: Path = Path(reader.__file__),
        observe: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self._path = bundle.path.resolve()
        self._header_bytes = header_bytes(bundle.manifest)
        self._limits = limits or Limits()
        self._program = program
        self._observe = observe
        self._lock = threading.Lock()  # of all below
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()  # the tenant whose turn it is first
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
        """Refuse an upload that could not wait, before it is received."""
        with self._lock:
            self._check_room(tenant)

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """The adapter of an upload; one whose caller is cancelled is read no further."""
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
            await asyncio.wait([waiter])  # until then its process may write
            with contextlib.suppress(TpeftError, OSError):
                waiter.result()
            raise

    def close(self) -> None:
        """End all readers; uploads that wait are refused."""
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
        """Begin with what waits, as far as readers are free."""
        while self._running.total() < self._limits.readers and (job := self._take()) is not None:
            self._running[job.tenant] += 1
            self._threads.submit(self._run, job)

    def _take(self) -> _Job | None:
        """The first upload of the first tenant that does not hold all readers but one already."""
        most = max(1, self._limits.readers - 1)
        tenant = next((tenant for tenant in self._waiting if self._running[tenant] < most), None)
        if tenant is None:
            return None
        jobs = self._waiting.pop(tenant)
        job = jobs.popleft()
        if jobs:
            self._waiting[tenant] = jobs  # behind the others
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
        """An idle reader, or a new one."""
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
