"""A few readers for all tenants: round-robin, with bounded waiting, replaced when they end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import stat
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from tpeft_deploy import errors
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import Bundle
from tpeft_deploy.errors import AdapterError, ProtocolError, QuotaExceeded, TpeftError, Unavailable, brief
from tpeft_deploy.formats import canonical
from tpeft_deploy.manifest import Manifest
from tpeft_deploy.runtime.server.isolation import reader
from tpeft_deploy.runtime.server.isolation.limits import Limits
from tpeft_deploy.runtime.server.isolation.process import Outcome, Process

__all__ = ["Direct", "Pool", "Reader", "Upload"]

_log = logging.getLogger("tpeft_deploy.server")
_REFUSAL_BYTES = 1 << 16
# What the header of a canonical file takes for one weight: a few tensors with offsets, a scale, a digest; and for all.
_HEAD_TIMES, _HEAD_MORE, _HEAD_LEAST = 8, 1024, 1 << 16


class Upload(NamedTuple):
    """An upload that was read.

    Attributes:
        adapter: what it says.
        data: the same as a canonical file.
    """

    adapter: Adapter
    data: bytes


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
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def check_room(self, tenant: str) -> None:
        """Refuse nothing."""

    async def read(self, tenant: str, directory: Path, of: str) -> Upload:
        """The adapter of an upload."""
        return await asyncio.to_thread(self._read, directory, of)

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
        self._header_bytes = _header_bytes(bundle.manifest)
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
            job.future.set_exception(_closing(job.of))
        self._threads.shutdown()
        for process in list(self._processes):
            self._drop(process)

    def _check_room(self, tenant: str) -> None:
        doing, fix = "take an upload", "Send it again later."
        own = len(self._waiting.get(tenant, ()))
        if self._closed:
            raise _closing("an upload")
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
                raise _closing(job.of)
            job.process = process
        outcome = process.ask(job.directory, job.of, self._limits)
        with job.lock:
            job.process = None
        if outcome is None:
            self._drop(process)
            if self._closed or job.abandoned:
                raise _closing(job.of)
            raise _crashed(job.of, "its process ended")
        self._give_back(process)
        self._observe(outcome)
        self._check(job.of, outcome)
        _raise_refusal(job)
        return self._result(job)

    def _abandon(self, job: _Job) -> None:
        with self._lock:
            jobs = self._waiting.get(job.tenant, deque())
            waits = job in jobs
            if waits:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.tenant]
        if waits:
            job.future.set_exception(_closing(job.of))
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
            raise Unavailable(f"read {of}", problem="the server cannot start a process for it now") from None
        with self._lock:
            closed = self._closed
            self._processes.add(process)
        if closed or not process.wait_ready():
            self._drop(process)
            if self._closed:
                raise _closing(of)
            _log.error("a reader of uploads did not start")
            raise Unavailable(f"read {of}", problem="the server cannot start a process for it now")
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

    def _check(self, of: str, outcome: Outcome) -> None:
        limits, status = self._limits, outcome.status
        if status == 0:
            return
        if outcome.late:
            raise _over(of, f"at most {limits.wall_seconds:g} s to read it")
        if status == -signal.SIGXCPU or outcome.cpu >= limits.cpu_seconds:
            raise _over(of, f"at most {limits.cpu_seconds} s of processor time to read it")
        if status == reader.NO_MEMORY:
            raise _over(of, f"at most {limits.memory_bytes:,} bytes of memory to read it")
        raise _crashed(of, f"its process ended with {'signal' if status < 0 else 'status'} {abs(status)}")

    def _result(self, job: _Job) -> Upload:
        place, limit = job.directory / reader.RESULT, self._limits.result_bytes
        data = _bounded(place, limit)
        if data is None:
            raise _crashed(job.of, "its process left no result")
        head = int.from_bytes(data[:8], "little")
        if head > self._header_bytes:  # parsed here, it would hold up everything else
            raise AdapterError(
                f"read {job.of}", expected=f"names and digests of at most {self._header_bytes:,} bytes", got=f"{head:,}"
            )
        return Upload(canonical.from_bytes(data, source=job.of), data)


def _header_bytes(manifest: Manifest) -> int:
    return _HEAD_LEAST + sum(_HEAD_TIMES * len(name.encode()) + _HEAD_MORE for name in manifest.stored)


def _bounded(place: Path, limit: int) -> bytes | None:
    """A file's bytes; None for one that is missing, longer or no plain file."""
    try:
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb", buffering=0) as file:  # a buffer would be copied while all threads wait
        about = os.fstat(handle)
        return file.readall() if stat.S_ISREG(about.st_mode) and about.st_size <= limit else None


def _raise_refusal(job: _Job) -> None:
    """Raise what a reader refused an upload with.

    Nothing in it is trusted: the class is one for files that are wrong, and the text is one line of bounded length.
    """
    place = job.directory / reader.REFUSAL
    if not place.exists() and not place.is_symlink():
        return
    try:
        found = json.loads(_bounded(place, _REFUSAL_BYTES) or b"")
        name, text, trace = (str(found.get(key, "")) for key in ("kind", "text", "trace"))
    except (ValueError, AttributeError, RecursionError):
        raise _crashed(job.of, "its process left no result") from None
    if name == "OSError":
        _raise_system(job.of, text)
    kind = getattr(errors, name, AdapterError) if name in errors.__all__ else AdapterError
    if not (isinstance(kind, type) and issubclass(kind, AdapterError | ProtocolError)):
        kind = AdapterError
    if not text:
        _log.error("a reader of uploads failed: %s", brief(trace, 4000))
        raise AdapterError(f"read {job.of}", problem=f"it is damaged, or of a kind that no reader knows ({name[:40]})")
    raise kind(brief(text, 2000))


def _raise_system(of: str, name: str) -> NoReturn:
    if name == "EFBIG":
        raise _over(of, "a canonical file within the limit")
    number = getattr(errno, name, errno.EIO) if name in {"ENOSPC", "EDQUOT"} else errno.EIO
    if number == errno.EIO:
        raise AdapterError(f"read {of}", problem=f"its files cannot be read ({name[:40]})")
    raise OSError(number, os.strerror(number))


def _over(of: str, expected: str) -> AdapterError:
    return AdapterError(
        f"read {of}",
        expected=expected,
        got="an adapter that takes more",
        fix="Check what saved it; the operator sets the server's limits (upload_...).",
    )


def _crashed(of: str, problem: str) -> AdapterError:
    return AdapterError(f"read {of}", problem=problem, fix="Check what saved it, or send it again.")


def _closing(of: str) -> Unavailable:
    return Unavailable(f"read {of}", problem="the server is stopping")
