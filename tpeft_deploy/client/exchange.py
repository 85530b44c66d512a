"""One call until it is answered: what is sent, how long it may take, and when it is sent again."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx

from tpeft_deploy.client.answers import Answer, refusal, retry_after
from tpeft_deploy.client.body import Body
from tpeft_deploy.errors import DeadlineExceeded, ServerError, TpeftError, Unavailable

__all__ = ["CLOCK", "Budget", "Call", "Clock", "Exchange", "Payload"]

T = TypeVar("T")

_FIRST_WAIT = 0.1  # seconds before the second attempt where the server names no time; doubled for each further one
_LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class Clock:
    """Time and chance, which tests replace.

    Attributes:
        now: seconds from any start.
        sleep: waits for so many seconds.
        pause: the same, without holding up the event loop.
        chance: a number of [0, 1).
    """

    now: Callable[[], float]
    sleep: Callable[[float], None]
    pause: Callable[[float], Awaitable[None]]
    chance: Callable[[], float]


CLOCK = Clock(time.monotonic, time.sleep, asyncio.sleep, random.random)


@dataclass(frozen=True)
class Payload:
    """Headers of a request's own, and its body."""

    headers: Mapping[str, str]
    body: Body


def _no_payload(left: float | None) -> Payload | None:
    return None


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is read.

    Attributes:
        doing: what it is for, in messages.
        method: of HTTP.
        path: below the server's URL, percent-encoded.
        read: makes the result of an answer.
        query: parameters of the URL.
        payload: given the seconds that are left, what is carried; made anew for each attempt.
        changes: it changes the server, so that it is not sent again unless the server cannot have seen it.
        statuses: that `read` understands; all others are refusals.
    """

    doing: str
    method: str
    path: str
    read: Callable[[Answer], T]
    query: Mapping[str, str] = field(default_factory=dict)
    payload: Callable[[float | None], Payload | None] = _no_payload
    changes: bool = False
    statuses: tuple[int, ...] = (200,)


class Budget:
    """The time that a call of the user's may take, in however many requests.

    Args:
        timeout: seconds; None: without end.
        clock: what tells the time.
    """

    def __init__(self, timeout: float | None, clock: Clock) -> None:
        self.timeout = timeout
        self._now = clock.now
        self._end = None if timeout is None else clock.now() + timeout

    def left(self, doing: str) -> float | None:
        """Seconds that are left; None: without end.

        Raises:
            DeadlineExceeded: none.
        """
        if self._end is None:
            return None
        left = self._end - self._now()
        if left <= 0:
            raise self.over(doing)
        return left

    def has(self, seconds: float) -> bool:
        """Whether something can still be done after so many seconds."""
        return self._end is None or self._now() + seconds < self._end

    def over(self, doing: str) -> DeadlineExceeded:
        """The error that says so."""
        return DeadlineExceeded(doing, expected=f"an answer within {self.timeout:g} s", got="none")


class Exchange(Generic[T]):
    """The attempts of one call.  It decides, and the clients send.

    Args:
        call: what is asked.
        budget: of all attempts together.
        retries: how many further attempts there may be.
        clock: time and chance.
    """

    def __init__(self, call: Call[T], budget: Budget, retries: int, clock: Clock) -> None:
        self._call = call
        self._budget = budget
        self._retries = retries
        self._clock = clock
        self._attempt = 0

    def left(self) -> float | None:
        """Seconds that are left, or DeadlineExceeded."""
        return self._budget.left(self._call.doing)

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The next attempt."""
        left, call = self.left(), self._call
        payload = call.payload(left)
        if payload is None:
            return http.build_request(call.method, call.path, params=call.query, timeout=left)
        body = payload.body
        return http.build_request(
            call.method,
            call.path,
            params=call.query,
            headers={**payload.headers, "Content-Length": str(body.size)},
            content=body.blocking() if isinstance(http, httpx.Client) else body.asynchronous(),
            timeout=left,
        )

    def answered(self, answer: Answer) -> float | None:
        """Seconds to wait before the next attempt, or None: the answer is what was asked for.

        Raises:
            TpeftError: the server's refusal, when asking again has no use.
        """
        if answer.status in self._call.statuses:
            return None
        error = refusal(answer, self._call.doing)
        if self._call.changes or answer.status not in {429, 503}:
            raise error
        stated = retry_after(answer.headers)
        # A quota without a time is not a matter of time.
        if stated is None and answer.status == 429:
            raise error
        return self._wait(error, stated)

    def failed(self, error: httpx.RequestError | TimeoutError) -> float:
        """Seconds to wait before the next attempt after there was no answer.

        Raises:
            Unavailable: no connection, or it was lost.
            DeadlineExceeded: the time was over.
            ServerError: what came is not HTTP.
        """
        found = self._told(error)
        if isinstance(error, httpx.ConnectError) and not _refused_certificate(error):
            return self._wait(found, None)
        raise found from error

    def result(self, answer: Answer) -> T:
        """What the call was for."""
        return self._call.read(answer)

    def _told(self, error: httpx.RequestError | TimeoutError) -> TpeftError:
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
        """A time that is not the same for all who were refused together, or the error when it would be too long."""
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
