# Written by .ci/unasync.py from asynchronous/connection.py; change that file, then run `make client`.
"""The blocking client: connection, time limits and retries."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import httpx

from tpeft_deploy.client.answers import Answer, BodyBuffer
from tpeft_deploy.client.blocking.stream import TextStream
from tpeft_deploy.client.exchange import CLOCK, Budget, Exchange, ServerCall, deadline
from tpeft_deploy.client.inference import BundleInfo
from tpeft_deploy.client.url import settings_of

__all__ = ["ServerConnection"]

T = TypeVar("T")
R = TypeVar("R")


class ServerConnection:
    """Connection to a server, with a time limit and retries for each call; arguments as `Client`."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float | None = 30,
        retries: int = 3,
        verify: ssl.SSLContext | str | bool = True,
        tenant: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**settings_of(url, key, verify), transport=transport)
        self._timeout = timeout
        self._retries = retries
        self._tenant = tenant
        self._clock = CLOCK
        self._bundles: dict[str, BundleInfo] = {}  # by component

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _budget(self, timeout: float | None = None) -> Budget:
        return Budget(self._timeout if timeout is None else timeout, self._clock)

    def _do(self, call: ServerCall[T], budget: Budget | None = None) -> T:
        exchange = Exchange(call, budget or self._budget(), self._retries, self._clock)
        return exchange.result(self._attempts(exchange, _whole))

    def _stream(self, call: ServerCall[T], budget: Budget) -> TextStream:
        return self._attempts(Exchange(call, budget, self._retries, self._clock), _begun)

    def _attempts(self, exchange: Exchange[T], read: Callable[[httpx.Response, Exchange[T]], R]) -> R:
        """Send a call until it succeeds, and return what `read` makes of the response."""
        while True:
            try:
                with deadline(exchange.left()):
                    response = self._http.send(exchange.request(self._http), stream=True)
                    if exchange.accepts(response.status_code):
                        return read(response, exchange)
                    answer = _whole(response, exchange)
            except (httpx.RequestError, TimeoutError) as error:
                wait = exchange.failed(error)
            else:
                wait = exchange.refused(answer)
            self._clock.sleep(wait)


def _whole(response: httpx.Response, exchange: Exchange[T]) -> Answer:
    try:
        body = BodyBuffer(response.headers)
        for chunk in response.iter_bytes():
            body.add(chunk)
            exchange.left()
        return Answer(response.status_code, response.headers, body.view())
    finally:
        response.close()


def _begun(response: httpx.Response, exchange: Exchange[T]) -> TextStream:
    return TextStream(response, exchange)
