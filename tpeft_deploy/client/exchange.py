"""Calls as data, and their attempts: requests, deadlines and retries, without sending anything."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx

from tpeft_deploy.client.answers import Answer, refusal, retry_after
from tpeft_deploy.client.body import RequestBody
from tpeft_deploy.errors import DeadlineExceeded, ServerError, TpeftError, Unavailable

__all__ = ["CLOCK", "Budget", "ServerCall", "Clock", "Exchange", "Payload", "async_deadline", "deadline"]

T = TypeVar("T")

_FIRST_WAIT = 0.1  # seconds before the first retry when the server names no time; doubled for each further one
_LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class Clock:
    """Time and randomness, which tests replace.

    Attributes:
        now: function that returns monotonic seconds.
        sleep: function that blocks for some seconds.
        pause: coroutine function that does not block the event loop.
        chance: function that returns a random number in [0, 1).
    """

    now: Callable[[], float]
    sleep: Callable[[float], None]
    pause: Callable[[float], Awaitable[None]]
    chance: Callable[[], float]


CLOCK = Clock(time.monotonic, time.sleep, asyncio.sleep, random.random)

async_deadline = asyncio.timeout
deadline = nullcontext[float | None]  # a blocking attempt ends by httpx's timeouts


@dataclass(frozen=True)
class Payload:
    """Body of a request with the headers that describe it."""

    headers: Mapping[str, str]
    body: RequestBody


def _no_payload(left: float | None) -> Payload | None:
    return None


@dataclass(frozen=True)
class ServerCall(Generic[T]):
    """A request, and how its response is read.

    Attributes:
        doing: purpose of the call, for error messages.
        method: HTTP method.
        path: percent-encoded path below the server's URL.
        read: function from the response to the result.
        query: query parameters.
        payload: function from the seconds left to the payload, called for each attempt.
        headers: further headers.
        changes: whether the call changes the server: not retried unless the server cannot have seen it.
        statuses: statuses that `read` handles; all others are errors.
    """

    doing: str
    method: str
    path: str
    read: Callable[[Answer], T]
    query: Mapping[str, str] = field(default_factory=dict)
    payload: Callable[[float | None], Payload | None] = _no_payload
    headers: Mapping[str, str] = field(default_factory=dict)
    changes: bool = False
    statuses: tuple[int, ...] = (200,)


class Budget:
    """Time limit of a call, over all its requests.

    Args:
        timeout: seconds; None: no limit.
        clock: source of time.
    """

    def __init__(self, timeout: float | None, clock: Clock) -> None:
        self.timeout = timeout
        self._now = clock.now
        self._end = None if timeout is None else clock.now() + timeout

    def left(self, doing: str) -> float | None:
        """Return the seconds left; None: no limit.

        Raises:
            DeadlineExceeded: no time is left.
        """
        if self._end is None:
            return None
        left = self._end - self._now()
        if left <= 0:
            raise self.over(doing)
        return left

    def has(self, seconds: float) -> bool:
        """Whether time is left after so many seconds."""
        return self._end is None or self._now() + seconds < self._end

    def over(self, doing: str) -> DeadlineExceeded:
        """Return the error for an exceeded limit."""
        return DeadlineExceeded(doing, expected=f"an answer within {self.timeout:g} s", got="none")


class Exchange(Generic[T]):
    """The attempts of one call: builds requests and decides on retries; the clients send.

    Args:
        call: the call.
        budget: time limit of all attempts together.
        retries: maximum number of retries.
        clock: time and randomness.
    """

    def __init__(self, call: ServerCall[T], budget: Budget, retries: int, clock: Clock) -> None:
        self._call = call
        self._budget = budget
        self._retries = retries
        self._clock = clock
        self._attempt = 0

    @property
    def doing(self) -> str:
        """Purpose of the call, for error messages."""
        return self._call.doing

    def left(self) -> float | None:
        """Return the seconds left, or raise DeadlineExceeded."""
        return self._budget.left(self._call.doing)

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Build the request of the next attempt."""
        left, call = self.left(), self._call
        payload = call.payload(left)
        if payload is None:
            return http.build_request(
                call.method, call.path, params=call.query, headers=dict(call.headers), timeout=left
            )
        body = payload.body
        return http.build_request(
            call.method,
            call.path,
            params=call.query,
            headers={**call.headers, **payload.headers, "Content-Length": str(body.size)},
            content=body.blocking() if isinstance(http, httpx.Client) else body.asynchronous(),
            timeout=left,
        )

    def accepts(self, status: int) -> bool:
        """Return whether a response with this status is the call's result."""
        return status in self._call.statuses

    def refused(self, answer: Answer) -> float:
        """Return the seconds to wait before a retry after an error status.

        Raises:
            TpeftError: the server's error, when a retry has no use.
        """
        error = refusal(answer, self._call.doing)
        if self._call.changes or answer.status not in {429, 503}:
            raise error
        stated = retry_after(answer.headers)
        # Without a time, the quota is not one that waiting replenishes.
        if stated is None and answer.status == 429:
            raise error
        return self._wait(error, stated)

    def failed(self, error: httpx.RequestError | TimeoutError) -> float:
        """Return the seconds to wait before a retry after a transport error.

        Raises:
            Unavailable: there is no connection, or it was lost.
            DeadlineExceeded: the time limit was exceeded.
            ServerError: the response cannot be decompressed.
        """
        found = self.error_of(error)
        if isinstance(error, httpx.ConnectError) and not _refused_certificate(error):
            return self._wait(found, None)
        raise found from error

    def result(self, answer: Answer) -> T:
        """Return the result of a successful call."""
        return self._call.read(answer)

    def error_of(self, error: httpx.RequestError | TimeoutError) -> TpeftError:
        """Return the error of this package for a transport error."""
        doing = self._call.doing
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            return self._budget.over(doing)
        if isinstance(error, httpx.ConnectError):
            return Unavailable(doing, problem=f"no connection to {error.request.url.netloc.decode()}: {error}")
        if isinstance(error, httpx.DecodingError):
            return ServerError(doing, problem=f"the answer cannot be decompressed: {error}")
        fix = "It may have been done: look before you send it again." if self._call.changes else None
        return Unavailable(doing, problem=f"the connection was lost: {str(error) or type(error).__name__}", fix=fix)

    def _wait(self, error: TpeftError, stated: float | None) -> float:
        """Return a jittered wait, or raise the error when no retry or time is left."""
        if stated is None:
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0**self._attempt) * (0.5 + 0.5 * self._clock.chance())
        else:
            wait = stated + min(1.0, 0.25 * stated) * self._clock.chance()
        if self._attempt >= self._retries or not self._budget.has(wait):
            raise error
        self._attempt += 1
        return wait


def _refused_certificate(error: BaseException) -> bool:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ssl.SSLError):
            return True
        found = found.__cause__ or found.__context__
    return False
