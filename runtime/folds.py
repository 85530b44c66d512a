"""Sessions of their own: the base's, and those of hot versions, made in the background and swapped in between two runs.

What is folded always starts from the base's own weights.  Before a session takes over, its answer to the bundle's
example is compared with that of the bank.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from tpeft_deploy.bundle import BASE_TASK, Bundle
from tpeft_deploy.errors import RunError, TpeftError
from tpeft_deploy.runtime import folding
from tpeft_deploy.runtime.plain import Plain
from tpeft_deploy.runtime.providers import ORT_ERRORS, Choice
from tpeft_deploy.runtime.versions import Version
from tpeft_deploy.tucker import Array

__all__ = ["Answer", "Folds"]

Answer = Callable[[Mapping[str, Array], Version | None], Mapping[str, Array]]

_log = logging.getLogger("tpeft_deploy.runtime")


class Folds:
    """Who has a session of its own; safe to use from several threads.

    Args:
        bundle: its base.onnx and weights.data, whose digests were checked.
        choice: the device.
        threads: intra-op threads of each session.
        half: whether the model computes in 16 bits.
        answer: what the bank answers to inputs for a version.
    """

    def __init__(self, bundle: Bundle, choice: Choice, threads: int | None, half: bool, answer: Answer) -> None:
        self._bundle = bundle
        self._choice = choice
        self._threads = threads
        self._half = half
        self._answer = answer
        self._lock = threading.Lock()
        self._jobs: dict[Version | None, Future[None]] = {}
        self._sessions: Mapping[Version | None, Plain] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tpeft-fold")

    def find(self, version: Version | None, rows: int) -> Plain | None:
        """The session of a version, None being the base, if it has one."""
        session = self._sessions.get(version)
        if session is None and version is None:
            self.begin(None)  # the base's own session is opened once somebody asks for the base
        return session

    def begin(self, version: Version | None) -> Future[None]:
        """Make a version's session in the background, unless there is one.

        Returns:
            Done once the session serves; its exception says why it does not.
        """
        with self._lock:
            job = self._jobs.get(version)
            if job is None:
                job = self._jobs[version] = self._worker.submit(self._make, version)
                job.add_done_callback(lambda done: self._report(version, done))
        return job

    def drop(self, version: Version) -> None:
        """Serve a version from the bank again; runs in flight finish on the session."""
        with self._lock:
            self._jobs.pop(version, None)
            self._sessions = {own: session for own, session in self._sessions.items() if own is not version}

    def has(self, version: Version) -> bool:
        """Whether a version is served by a session of its own."""
        return version in self._sessions

    @property
    def nbytes(self) -> int:
        """Bytes of weights that the sessions hold besides the base's."""
        return sum(session.nbytes for session in self._sessions.values())

    def close(self) -> None:
        """Let all sessions go, after those that are being made."""
        self._worker.shutdown(cancel_futures=True)
        self._sessions = {}

    def _make(self, version: Version | None) -> None:
        name = BASE_TASK if version is None else version.name
        began = time.perf_counter()
        try:
            session = self._open(version)
        except ORT_ERRORS as error:
            raise RunError(
                f"fold task {name!r}",
                expected="a session of base.onnx with its weights",
                got=str(error).splitlines()[0][:200],
                fix="It goes on being served from the bank.",
            ) from error
        inputs = folding.example(self._bundle)
        off = folding.prove(session, self._bundle.manifest, inputs, self._answer(inputs, version), task=name)
        with self._lock:
            if version in self._jobs:  # else it was dropped while it was made
                self._sessions = {**self._sessions, version: session}
        _log.info("task %r has a session of its own after %.2f s (error %.1e)", name, time.perf_counter() - began, off)

    def _open(self, version: Version | None) -> Plain:
        if version is None:
            file = self._bundle.check_file("base.onnx")
            return Plain(file, self._choice, threads=self._threads, half=self._half)
        return folding.fold(self._bundle, version.read(), self._choice, threads=self._threads, half=self._half)

    def _report(self, version: Version | None, job: Future[None]) -> None:
        if job.cancelled():
            return
        error = job.exception()
        if error is None:
            return
        # Who asked for it gets it from the future; for the others this is the only sign.
        _log.warning("%s", error if isinstance(error, TpeftError) else repr(error))
        if version is not None:  # the base is asked for by every run of it: once is enough
            with self._lock:
                self._jobs.pop(version, None)
