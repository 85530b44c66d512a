"""The asynchronous client: connection, time limits and retries."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

import httpx

from tpeft_deploy.client.answers import Answer, BodyBuffer
from tpeft_deploy.client.asynchronous.stream import AsyncTextStream
from tpeft_deploy.client.exchange import CLOCK, Budget, Exchange, ServerCall, async_deadline
from tpeft_deploy.client.inference import BundleInfo
from tpeft_deploy.client.url import settings_of

__all__ = ["AsyncServerConnection"]

T = TypeVar("T")
R = TypeVar("R")


class AsyncServerConnection:
    """Connection to a server, with a time limit and retries for each call; arguments as `AsyncClient`."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float | None = 30,
        retries: int = 3,
        verify: ssl.SSLContext | str | bool = True,
        tenant: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**settings_of(url, key, verify), transport=transport)
        self._timeout = timeout
        self._retries = retries
        self._tenant = tenant
        self._clock = CLOCK
        self._bundles: dict[str, BundleInfo] = {}  # by component

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _budget(self, timeout: float | None = None) -> Budget:
        return Budget(self._timeout if timeout is None else timeout, self._clock)

    async def _do(self, call: ServerCall[T], budget: Budget | None = None) -> T:
        exchange = Exchange(call, budget or self._budget(), self._retries, self._clock)
        return exchange.result(await self._attempts(exchange, _whole))

    async def _stream(self, call: ServerCall[T], budget: Budget) -> AsyncTextStream:
        return await self._attempts(Exchange(call, budget, self._retries, self._clock), _begun)

    async def _attempts(self, exchange: Exchange[T], read: Callable[[httpx.Response, Exchange[T]], Awaitable[R]]) -> R:
        """Send a call until it succeeds, and return what `read` makes of the response."""
        while True:
            try:
                async with async_deadline(exchange.left()):
                    response = await self._http.send(exchange.request(self._http), stream=True)
                    if exchange.accepts(response.status_code):
                        return await read(response, exchange)
                    answer = await _whole(response, exchange)
            except (httpx.RequestError, TimeoutError) as error:
                wait = exchange.failed(error)
            else:
                wait = exchange.refused(answer)
            await self._clock.pause(wait)


async def _whole(response: httpx.Response, exchange: Exchange[T]) -> Answer:
    try:
        body = BodyBuffer(response.headers)
        async for chunk in response.aiter_bytes():
            body.add(chunk)
            exchange.left()
        return Answer(response.status_code, response.headers, body.view())
    finally:
        await response.aclose()


async def _begun(response: httpx.Response, exchange: Exchange[T]) -> AsyncTextStream:
    return AsyncTextStream(response, exchange)
