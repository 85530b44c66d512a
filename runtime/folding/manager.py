"""Folded sessions of the base and of hot versions, made in the background and swapped in between two runs.

Every fold starts from the base's weights.  Before a session takes over, its answer to the bundle's
example is compared with that of the bank.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import RunError, TpeftError
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.folding import compare, merge
from tpeft_deploy.runtime.folding.hotness import Heat
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS
from tpeft_deploy.tucker import Array

__all__ = ["BankedAnswer", "FoldManager"]

_DECIDE = 1.0  # seconds between two decisions about what is hot

BankedAnswer = Callable[[Mapping[str, Array], Version], Mapping[str, Array]]

_log = logging.getLogger("tpeft_deploy.runtime")


class FoldManager:
    """Versions that have folded sessions; safe to use from several threads.

    Args:
        bundle: bundle, or component, with base.onnx and weights.data, with digests checked by the caller.
        sessions: makes the sessions; none of them is recorded as a CUDA graph.
        answer: computes the outputs of a version from the bank.
        place: a directory of this process for packed copies of the base, shared by folds on the CPU.
        budget: bytes of memory for the sessions of versions that are folded because most rows go to them.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: SessionFactory,
        answer: BankedAnswer,
        *,
        place: Path,
        budget: int = 0,
    ) -> None:
        self._bundle = bundle
        self._factory = sessions.with_cuda(graphs=False)
        self._answer = answer
        self._lock = threading.Lock()
        self._jobs: dict[Version, Future[None]] = {}
        self._sessions: Mapping[Version, Plain] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tpeft-fold")
        self._place = place
        # Two of every weight, as it is and packed, until a version's adapter was read and says it better.
        most = 2 * sum(weight.length for weight in bundle.manifest.weights.values())
        self._costs: dict[Version, int] = {}
        self._heat = Heat[Version](budget, cost=lambda version: self._costs.get(version, most)) if budget else None
        self._decided = time.monotonic()
        self._closed = False

    def find(self, version: Version, rows: int) -> Plain | None:
        """Return the session of a version, if it has one, and count the rows."""
        session = self._sessions.get(version)
        if version.is_base:
            if session is None and not self._closed:
                self.begin(version)  # opened with the first request for the base
        elif self._heat is not None and version.current:
            now = time.monotonic()
            self._heat.record(version, rows, now)
            if now - self._decided > _DECIDE:
                self._decided = now
                with self._lock:
                    if not self._closed:
                        self._worker.submit(self._follow, self._heat, now)
        return session

    def keep(self, version: Version) -> Future[None]:
        """As `begin`, and count it before all that are folded because they are hot."""
        if self._heat is not None:
            self._heat.pin(version)
        return self.begin(version)

    def begin(self, version: Version) -> Future[None]:
        """Make a version's session in the background, unless there is one.

        Returns:
            Done once the session serves; its exception says why it does not.
        """
        with self._lock:
            job = self._jobs.get(version)
            if job is not None:
                return job
            if self._closed:
                refused: Future[None] = Future()
                refused.set_exception(RunError(f"fold task {version.name!r}", problem="the runtime is closed"))
                return refused
            job = self._jobs[version] = self._worker.submit(self._make, version)
        # Without the lock, which `_report` takes: a job that has failed by now reports here, in this thread.
        job.add_done_callback(lambda done: self._report(version, done))
        return job

    def drop(self, version: Version) -> None:
        """Serve a version from the bank again, until it is hot once more; runs in flight finish on the session."""
        if self._heat is not None:
            self._heat.forget(version)
        self._let_go(version)

    def has(self, version: Version) -> bool:
        """Whether a version is served by a folded session."""
        return version in self._sessions

    @property
    def nbytes(self) -> int:
        """Bytes of weights that the sessions hold beside the base's."""
        return sum(session.nbytes for session in self._sessions.values())

    def close(self) -> None:
        """Let all sessions go, after those that are being made."""
        with self._lock:
            self._closed = True
        self._worker.shutdown(cancel_futures=True)
        self._sessions = {}

    def _follow(self, heat: Heat[Version], now: float) -> None:
        fold, unfold = heat.decide(now)
        for version in unfold:
            self._let_go(version)
        for version in fold:
            if version.current:
                self.begin(version)
            else:
                heat.forget(version)

    def _let_go(self, version: Version) -> None:
        with self._lock:
            self._jobs.pop(version, None)
            self._costs.pop(version, None)
            self._sessions = {own: session for own, session in self._sessions.items() if own is not version}

    def _make(self, version: Version) -> None:
        name = version.name
        began = time.perf_counter()
        with self._lock:
            if version not in self._jobs:
                return  # dropped before its turn came
        try:
            session = self._open(version)
        except ORT_ERRORS as error:
            raise RunError(
                f"fold task {name!r}",
                expected="a session of base.onnx with its weights",
                got=str(error).splitlines()[0][:200],
                fix="It goes on being served from the bank.",
            ) from error
        inputs = self._bundle.example()
        expected, tf32 = self._answer(inputs, version), self._factory.cuda.tf32
        off = compare.prove(session, self._bundle.manifest, inputs, expected, task=name, tf32=tf32)
        with self._lock:
            if version in self._jobs and version.current:
                self._sessions = {**self._sessions, version: session}
            else:  # dropped while it was made, or asked for when no task stood for it any more
                self._jobs.pop(version, None)
                self._costs.pop(version, None)
        if not version.current and self._heat is not None:
            self._heat.forget(version)
        _log.info("task %r has a folded session after %.2f s (error %.1e)", name, time.perf_counter() - began, off)

    def _open(self, version: Version) -> Plain:
        adapter = None if version.is_base else self._bundle.part(version.read())
        if adapter is None:
            return Plain(self._bundle.check_file("base.onnx"), self._factory)
        self._costs[version] = merge.cost(self._bundle, adapter, shared=self._factory.choice.execution.prepacks)
        return merge.fold(self._bundle, adapter, self._factory, place=self._place)

    def _report(self, version: Version, job: Future[None]) -> None:
        if job.cancelled():
            return
        error = job.exception()
        if error is None:
            return
        # The caller gets it from the future; everybody else sees this warning only.
        _log.warning("%s", error if isinstance(error, TpeftError) else repr(error))
        if not version.is_base:  # the base is asked for by every run of it: once is enough
            if self._jobs.get(version, job) is job:  # else it was dropped, and is being made once more
                self._let_go(version)
            if self._heat is not None:
                (self._heat.refuse if version.current else self._heat.forget)(version)
