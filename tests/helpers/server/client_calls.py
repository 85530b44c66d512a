"""The same calls through both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from tpeft_deploy import AsyncClient, Client
from tpeft_deploy.client.exchange import Clock

Use = Callable[[Any], Any]
Calling = Callable[..., list[Any]]


class Hours:
    """A clock that only sleeping moves; `chances` come from `chance`."""

    def __init__(self, chance: float = 0.0) -> None:
        self.time = 0.0
        self.slept: list[float] = []
        self.clock = Clock(lambda: self.time, self._sleep, self._pause, lambda: chance)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    async def _pause(self, seconds: float) -> None:
        self._sleep(seconds)


def blocking(url: str, uses: Sequence[Use], hours: Hours | None = None, **settings: Any) -> list[Any]:
    with Client(url, **settings) as client:
        if hours is not None:
            client._clock = hours.clock
        return [use(client) for use in uses]


def asynchronous(url: str, uses: Sequence[Use], hours: Hours | None = None, **settings: Any) -> list[Any]:
    async def go() -> list[Any]:
        async with AsyncClient(url, **settings) as client:
            if hours is not None:
                client._clock = hours.clock
            return [await use(client) for use in uses]

    return asyncio.run(go())


BOTH: dict[str, Calling] = {"Client": blocking, "AsyncClient": asynchronous}
