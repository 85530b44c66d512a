"""Calls of a remote service with a deadline, in a bounded number of threads, behind a circuit breaker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tpeft_deploy.errors import InsufficientStorage, Unavailable

__all__ = ["GuardedCalls"]

_log = logging.getLogger("tpeft_deploy.server")
_T = TypeVar("_T")
_MOST = 16  # concurrent calls, with those that hang
_PROBE_SECONDS = 2.0


class GuardedCalls:
    """Runs blocking calls that may hang.

    A call that fails or passes its deadline opens the breaker: further calls are refused at once, and a probe in the
    background closes it again.  A thread that hangs is abandoned; while `most` of them hang, nothing is called.

    Args:
        timeout: seconds that a call may take.
        probe: cheap call that succeeds if the service works.
        hide: function that removes credentials from the text of an error.
        most: maximum number of threads.
        clock: monotonic clock.
    """

    def __init__(
        self,
        timeout: float,
        probe: Callable[[], object],
        hide: Callable[[str], str] = str,
        *,
        most: int = _MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout = timeout
        self._probe = probe
        self._hide = hide
        self._clock = clock
        self._seats = threading.BoundedSemaphore(most)
        self._lock = threading.Lock()  # guards the fields below
        self._opened: float | None = None  # when the breaker opened, or the last probe began
        self._probing = False

    @property
    def broken(self) -> bool:
        """Whether calls are refused."""
        return self._opened is not None

    def call(self, doing: str, function: Callable[..., _T], *args: Any, parts: int = 1) -> _T:
        """Run a function in a thread.

        Args:
            doing: purpose of the call, for error messages.
            function: function to run.
            args: arguments of the function.
            parts: number of timeouts that the call may take, for calls that transfer much.

        Raises:
            Unavailable: the function raised, did not end in time, or was not called.
            FileNotFoundError, InsufficientStorage: as raised by the function.
        """
        if self._refuses():
            raise _gone(doing)
        result = self._start(function, args, self.timeout)
        if result is None:
            self._open(f"{doing}: all threads are in use by calls that do not end")
            raise _gone(doing)
        try:
            return result.result(self.timeout * parts)
        except (FileNotFoundError, InsufficientStorage):
            raise
        except TimeoutError as error:
            self._open(f"{doing}: no answer within {self.timeout * parts:g} s")
            raise _gone(doing) from error
        except Exception as error:  # drivers raise errors of many kinds
            self._open(f"{doing}: {type(error).__name__}: {self._hide(str(error))}")
            raise _gone(doing) from None  # the driver's text may have credentials

    def _start(self, function: Callable[..., _T], args: tuple[Any, ...], patience: float) -> Future[_T] | None:
        if not self._seats.acquire(timeout=patience):
            return None
        result: Future[_T] = Future()

        def run() -> None:
            try:
                result.set_result(function(*args))
            except BaseException as error:  # reported by the caller
                result.set_exception(error)
            finally:
                self._seats.release()

        # Daemons: the process must be able to end while one hangs.
        threading.Thread(target=run, name="tpeft-store", daemon=True).start()
        return result

    def _refuses(self) -> bool:
        """Whether the breaker is open; starts a probe when one is due."""
        with self._lock:
            if self._opened is None:
                return False
            if self._probing or self._clock() - self._opened < _PROBE_SECONDS:
                return True
            self._opened, self._probing = self._clock(), True
        probing = self._start(self._probe, (), 0)
        if probing is None:
            self._probing = False
        else:
            probing.add_done_callback(self._probed)
        return True

    def _probed(self, probing: Future[object]) -> None:
        error = probing.exception()
        with self._lock:
            self._probing = False
            if error is None or isinstance(error, FileNotFoundError):
                self._opened = None
        if not self.broken:
            _log.warning("the store of adapters answers again")

    def _open(self, reason: str) -> None:
        with self._lock:
            before, self._opened = self._opened, self._clock()
        if before is None:
            _log.error("the store of adapters does not work: %s", reason)


def _gone(doing: str) -> Unavailable:
    return Unavailable(doing, problem="the server's store of adapters does not answer", fix="Try again shortly.")
