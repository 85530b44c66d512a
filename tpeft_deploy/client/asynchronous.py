"""The client for programs on an event loop of asyncio."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, overload

import httpx

from tpeft_deploy.client import calls, inference
from tpeft_deploy.client.answers import Answer, Document, Landing
from tpeft_deploy.client.connecting import settings_of
from tpeft_deploy.client.exchange import CLOCK, Budget, Call, Exchange
from tpeft_deploy.client.inference import Facts, Outputs, Wish
from tpeft_deploy.tucker import Array

__all__ = ["AsyncClient"]

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same calls, awaited; cancelling one takes the request out of the server's queue.

    Use `async with`, or `await client.close()`.

    Args:
        url, key, timeout, retries, verify, tenant, transport: as for `Client`.
    """

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
        settings = settings_of(url, key, verify)
        self._http = httpx.AsyncClient(
            base_url=settings.url,
            headers=settings.headers,
            verify=settings.verify,
            limits=settings.limits,
            transport=transport,
        )
        self._timeout = timeout
        self._retries = retries
        self._tenant = tenant
        self._facts: Facts | None = None
        self._clock = CLOCK

    @overload
    async def infer(
        self,
        inputs: Mapping[str, object],
        task: str = "base",
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array]: ...

    @overload
    async def infer(
        self,
        inputs: Mapping[str, object],
        *,
        tasks: Sequence[str],
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Outputs: ...

    async def infer(
        self,
        inputs: Mapping[str, object],
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array] | Outputs:
        """As `Client.infer`."""
        wish = Wish(inputs, task, tasks, outputs, priority)
        budget = self._budget(timeout)
        facts = await self._ask_facts(budget) if wish.needs_facts else None
        return await self._do(inference.infer(wish, facts), budget)

    async def tasks(self) -> list[Document]:
        """As `Client.tasks`."""
        return await self._do(calls.tasks(self._tenant))

    async def task(self, name: str) -> Document:
        """As `Client.task`."""
        return await self._do(calls.task(name, self._tenant))

    async def register(
        self, name: str, path: str | os.PathLike[str], *, alias: str = "current", timeout: float | None = None
    ) -> Document:
        """As `Client.register`."""
        return await self._do(calls.register(name, path, alias, self._tenant), self._budget(timeout))

    async def point(self, name: str, alias: str, version: int | str, *, expected: int | str | None = None) -> Document:
        """As `Client.point`."""
        return await self._do(calls.point(name, alias, version, self._tenant, expected))

    async def rollback(self, name: str, alias: str = "current", *, expected: int | str | None = None) -> Document:
        """As `Client.rollback`."""
        return await self._do(calls.rollback(name, alias, self._tenant, expected))

    async def history(self, name: str, alias: str = "current", limit: int = 100) -> list[Document]:
        """As `Client.history`."""
        return await self._do(calls.history(name, alias, limit, self._tenant))

    async def delete(self, name: str, version: int | str | None = None) -> None:
        """As `Client.delete`."""
        return await self._do(calls.delete(name, version, self._tenant))

    async def publish(self, name: str, tenant: str | None = None) -> Document:
        """As `Client.publish`."""
        return await self._do(calls.publish(name, self._tenant if tenant is None else tenant))

    async def pin(self, name: str, folded: bool = False) -> Document:
        """As `Client.pin`."""
        return await self._do(calls.pin(name, folded, self._tenant))

    async def unpin(self, name: str) -> None:
        """As `Client.unpin`."""
        return await self._do(calls.unpin(name, self._tenant))

    async def ready(self, model: str | None = None) -> bool:
        """As `Client.ready`."""
        return await self._do(calls.ready(model))

    async def live(self) -> bool:
        """As `Client.live`."""
        return await self._do(calls.live())

    async def metadata(self, model: str | None = None) -> Document:
        """As `Client.metadata`."""
        return await self._do(calls.metadata(model))

    async def statistics(self, model: str | None = None) -> Document:
        """As `Client.statistics`."""
        return await self._do(calls.statistics(model))

    async def keys(self) -> list[Document]:
        """As `Client.keys`."""
        return await self._do(calls.keys(self._tenant))

    async def create_key(self, tenant: str, role: str, *, expires_in: float | None = None) -> Document:
        """As `Client.create_key`."""
        return await self._do(calls.create_key(tenant, role, expires_in))

    async def revoke_key(self, id: str) -> None:
        """As `Client.revoke_key`."""
        return await self._do(calls.revoke_key(id))

    async def tenants(self) -> list[Document]:
        """As `Client.tenants`."""
        return await self._do(calls.tenants())

    async def set_tenant(self, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """As `Client.set_tenant`."""
        return await self._do(calls.set_tenant(tenant, quota))

    async def audit(self, limit: int = 100, before: int | None = None) -> list[Document]:
        """As `Client.audit`."""
        return await self._do(calls.audit(limit, before))

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

    async def _ask_facts(self, budget: Budget) -> Facts:
        if self._facts is None:
            name = await self._do(inference.name_of(), budget)
            self._facts = await self._do(inference.facts_of(name), budget)
        return self._facts

    async def _do(self, call: Call[T], budget: Budget | None = None) -> T:
        exchange = Exchange(call, budget or self._budget(), self._retries, self._clock)
        while True:
            try:
                async with asyncio.timeout(exchange.left()):
                    answer = await self._send(exchange)
            except (httpx.RequestError, TimeoutError) as error:
                wait = exchange.failed(error)
            else:
                again = exchange.answered(answer)
                if again is None:
                    return exchange.result(answer)
                wait = again
            await self._clock.pause(wait)

    async def _send(self, exchange: Exchange[T]) -> Answer:
        response = await self._http.send(exchange.request(self._http), stream=True)
        try:
            landing = Landing(response.headers)
            async for chunk in response.aiter_bytes():
                landing.add(chunk)
            return Answer(response.status_code, response.headers, landing.body())
        finally:
            await response.aclose()
