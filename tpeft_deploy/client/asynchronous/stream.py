"""The asynchronous client: text that arrives while it is generated."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any, Self

import httpx

from tpeft_deploy.client.answers import Document
from tpeft_deploy.client.events import TextEvents
from tpeft_deploy.client.exchange import Exchange, async_deadline

__all__ = ["AsyncTextStream"]


class AsyncTextStream:
    """Pieces of a text, to be iterated over while the server generates it.

    Close it, or use it as a context manager, when it is not read to its end; the server then stops within one step.

    Args:
        response: response whose body was not read.
        exchange: the call that it answers.
    """

    def __init__(self, response: httpx.Response, exchange: Exchange[Any]) -> None:
        self._response = response
        self._exchange = exchange
        self._chunks = response.aiter_bytes()
        self._events = TextEvents(exchange.doing)
        self._pieces: deque[str] = deque()
        self._open = True

    @property
    def reason(self) -> str | None:
        """Reason of the text's end, "stop" or "length"; None before it."""
        return self._events.reason

    @property
    def usage(self) -> Document | None:
        """Numbers of tokens, as in `Completion`; None before the end."""
        return self._events.usage

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._pieces:
            if not self._open:
                raise StopAsyncIteration
            try:
                await self._read()
            except BaseException:
                await self.close()
                raise
        return self._pieces.popleft()

    async def _read(self) -> None:
        try:
            async with async_deadline(self._exchange.left()):
                chunk = await anext(self._chunks, b"")
        except (httpx.RequestError, TimeoutError) as error:
            raise self._exchange.error_of(error) from error
        if chunk:
            self._pieces.extend(self._events.read(chunk))
        else:
            self._events.check_end()
            await self.close()

    async def close(self) -> None:
        """Stop reading."""
        self._open = False
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
