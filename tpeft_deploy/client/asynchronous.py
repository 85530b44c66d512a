"""The asynchronous client."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, overload

import httpx

from tpeft_deploy.client import calls, inference
from tpeft_deploy.client.answers import Answer, BodyBuffer, Document
from tpeft_deploy.client.exchange import CLOCK, Budget, Exchange, ServerCall, async_deadline
from tpeft_deploy.client.inference import BundleInfo, InferArguments, Outputs
from tpeft_deploy.client.url import settings_of
from tpeft_deploy.tucker import Array

__all__ = ["AsyncClient"]

T = TypeVar("T")


class AsyncClient:
    """Asynchronous client of a server, for asyncio; a cancelled call leaves the server's queue.

    Use `async with`, or `await client.close()`.  Error statuses are raised as errors of `tpeft_deploy.errors` with the
    server's text: InputError (400), Unauthenticated (401), Forbidden (403), NotFound (404), Conflict (409), TooLarge
    (413), QuotaExceeded (429, with `retry_after`), Unsupported (501), QueueFull or Unavailable (503, or no connection),
    DeadlineExceeded (504, or no answer within the timeout), InsufficientStorage (507), else ServerError.

    Calls that read or infer are retried when the server has no capacity now (429 with a time, 503), after the time
    that the server names and within the timeout.  Every call is retried when the connection cannot be opened; calls
    that change the server are retried in no other case.

    Args:
        url: URL of the server, `http://HOST:PORT` or `https://HOST`.
        key: API key; by default the value of the environment variable TPEFT_KEY.  None in both: no key is sent.
        timeout: seconds per call, retries included (default 30); None: no limit.
        retries: maximum number of retries per call (default 3).
        verify: trusted certificates: httpx's default (True, default), a PEM file (a path), or an SSL context; False
            disables the check.
        tenant: tenant that an admin's calls are about; by default the tenant of the key.
        transport: httpx transport to use instead of the network.

    Raises:
        InputError: the URL is not an HTTP URL, or the key has characters that cannot be sent.
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
        self._http = httpx.AsyncClient(**settings_of(url, key, verify), transport=transport)
        self._timeout = timeout
        self._retries = retries
        self._tenant = tenant
        self._bundle: BundleInfo | None = None
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
        """Run a batch on the server.

        Args:
            inputs: input name -> array with the model's dtype, which is sent unconverted; bfloat16 as uint16.
            task: task of all rows, `name` or `name@version` (default "base", unless `tasks` is given).
            tasks: one task per row, instead of `task`.
            outputs: names of the outputs to return (default all).
            timeout: seconds for the call (default the client's); the server gets the time left and stops at its end.
            priority: priority among the tenant's requests (default 0); lower values are served first.

        Returns:
            Output name -> writable array; its elements are `bytes` objects for BYTES.  With `tasks`, an output with
            rows of different sizes is a list of arrays, one per row.

        Raises:
            InputError: inputs, tasks or outputs do not fit the model.
            NotFound: the task does not exist, or the key may not see it.
            QuotaExceeded, QueueFull, Unavailable: the server has no capacity, after all retries.
            DeadlineExceeded: no answer within the timeout.
        """
        arguments = InferArguments(inputs, task, tasks, outputs, priority)
        budget = self._budget(timeout)
        bundle = await self._bundle_info(budget) if arguments.needs_bundle else None
        return await self._do(inference.infer(arguments, bundle), budget)

    async def tasks(self) -> list[Document]:
        """List the tasks that the key may see, with their versions and aliases."""
        return await self._do(calls.tasks(self._tenant))

    async def task(self, name: str) -> Document:
        """Return a task with its versions and aliases.

        Args:
            name: name of the task.

        Raises:
            NotFound: the task does not exist, or the key may not see it.
        """
        return await self._do(calls.task(name, self._tenant))

    async def register(
        self, name: str, path: str | os.PathLike[str], *, alias: str = "current", timeout: float | None = None
    ) -> Document:
        """Upload an adapter as a new version of a task; the version is checked and ready when this returns.

        Args:
            name: name of the task; created when it does not exist.
            path: a .safetensors file, or a directory that PEFT saved; the upload is streamed.
            alias: alias that points to the new version afterwards (default "current").
            timeout: seconds for upload and check (default the client's).

        Returns:
            The task afterwards.

        Raises:
            FormatError: the files are pickles or no adapter; nothing was sent.
            InputError: the adapter does not fit the server's base.
            Conflict, QuotaExceeded, TooLarge: the server refuses the adapter.
        """
        return await self._do(calls.register(name, path, alias, self._tenant), self._budget(timeout))

    async def point(self, name: str, alias: str, version: int | str, *, expected: int | str | None = None) -> Document:
        """Point an alias of a task to a version; in-flight requests finish on the earlier one.

        Args:
            name: name of the task.
            alias: alias to change; created when it does not exist.
            version: number or alias of the version to point to.
            expected: number of the version that the alias must point to now (default any).

        Returns:
            The task afterwards.

        Raises:
            NotFound: the task or version does not exist.
            Conflict: the alias does not point to `expected`.
        """
        return await self._do(calls.point(name, alias, version, self._tenant, expected))

    async def rollback(self, name: str, alias: str = "current", *, expected: int | str | None = None) -> Document:
        """Point an alias to its previous version; a second rollback undoes the first.

        Args:
            name: name of the task.
            alias: alias to change (default "current").
            expected: number of the version that the alias must point to now (default any).

        Returns:
            The task afterwards.

        Raises:
            NotFound: the task or alias does not exist.
            Conflict: the alias does not point to `expected`, or has no previous version.
        """
        return await self._do(calls.rollback(name, alias, self._tenant, expected))

    async def history(self, name: str, alias: str = "current", limit: int = 100) -> list[Document]:
        """List the versions that an alias pointed to, with time and key of each change, newest first.

        Args:
            name: name of the task.
            alias: alias to list (default "current").
            limit: maximum number of entries (default and largest 100).

        Raises:
            NotFound: the task or alias does not exist.
        """
        return await self._do(calls.history(name, alias, limit, self._tenant))

    async def delete(self, name: str, version: int | str | None = None) -> None:
        """Delete a task, or one version of it.

        Args:
            name: name of the task.
            version: number of the version to delete (default the whole task).

        Raises:
            NotFound: the task or version does not exist.
            Conflict: an alias points to the version.
        """
        return await self._do(calls.delete(name, version, self._tenant))

    async def publish(self, name: str, tenant: str | None = None) -> Document:
        """Share a task with all tenants; needs an admin's key.

        Args:
            name: name of the task.
            tenant: tenant that has the task (default the client's).

        Returns:
            The shared task.

        Raises:
            NotFound: the task does not exist.
            Conflict: another tenant has a task of that name, or it was shared before.
        """
        return await self._do(calls.publish(name, self._tenant if tenant is None else tenant))

    async def pin(self, name: str, folded: bool = False) -> Document:
        """Pin a task's current version to the device.

        Args:
            name: name of the task.
            folded: use a separate session with merged weights instead of the shared bank (default False).

        Returns:
            The task afterwards.

        Raises:
            NotFound: the task does not exist.
            QuotaExceeded: the tenant's pins are used up.
            Conflict: the task is a shared one, or cannot have a separate session and is pinned without it.
        """
        return await self._do(calls.pin(name, folded, self._tenant))

    async def unpin(self, name: str) -> None:
        """Allow a task to be evicted from the device again.

        Args:
            name: name of the task.
        """
        return await self._do(calls.unpin(name, self._tenant))

    async def ready(self, model: str | None = None) -> bool:
        """Return whether the server takes requests.

        Args:
            model: model to ask about, `name` or `name@version` (default the server as a whole).

        Raises:
            Unavailable: there is no connection.
        """
        return await self._do(calls.ready(model))

    async def live(self) -> bool:
        """Return whether the server's process works.

        Raises:
            Unavailable: there is no connection.
        """
        return await self._do(calls.live())

    async def metadata(self, model: str | None = None) -> Document:
        """Return metadata: name, version and extensions of the server, or versions, inputs and outputs of a model.

        Args:
            model: model to ask about, `name` or `name@version` (default the server).
        """
        return await self._do(calls.metadata(model))

    async def statistics(self, model: str | None = None) -> Document:
        """Return counts and durations of requests per model.

        Args:
            model: model to ask about, `name` or `name@version` (default all that the key may see).
        """
        return await self._do(calls.statistics(model))

    async def keys(self) -> list[Document]:
        """List ids, tenants, roles and times of keys, without the keys; needs an admin's key."""
        return await self._do(calls.keys(self._tenant))

    async def create_key(self, tenant: str, role: str, *, expires_in: float | None = None) -> Document:
        """Create a key, returned only this once under `key`; needs an admin's key.

        Args:
            tenant: tenant that the key is for; created when it does not exist.
            role: "infer", "deploy" or "admin".
            expires_in: seconds until the key expires (default never).

        Returns:
            The key with its id, tenant, role and times.
        """
        return await self._do(calls.create_key(tenant, role, expires_in))

    async def revoke_key(self, id: str) -> None:
        """Revoke a key: the server refuses it from now on; needs an admin's key.

        Args:
            id: id of the key, as `keys` lists it.

        Raises:
            NotFound: no key has this id.
        """
        return await self._do(calls.revoke_key(id))

    async def tenants(self) -> list[Document]:
        """List tenants with their quotas and usage; needs an admin's key."""
        return await self._do(calls.tenants())

    async def set_tenant(self, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """Set quotas of a tenant; needs an admin's key.

        Args:
            tenant: name of the tenant; created when it does not exist.
            quota: quota name -> limit, None for no limit: requests_per_s, rows_per_s, queue_share, adapters, bytes,
                pins, folded, tokens_per_min, and weight.  Quotas left out get the server's default.

        Returns:
            The tenant afterwards.
        """
        return await self._do(calls.set_tenant(tenant, quota))

    async def audit(self, limit: int = 100, before: int | None = None) -> list[Document]:
        """List changes of keys, tenants and tasks, newest first; needs an admin's key.

        Args:
            limit: maximum number of entries (default 100, largest 1000).
            before: id of the last entry of the page before (default the first page).
        """
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

    async def _bundle_info(self, budget: Budget) -> BundleInfo:
        if self._bundle is None:
            name = await self._do(inference.bundle_name(), budget)
            self._bundle = await self._do(inference.bundle_info(name), budget)
        return self._bundle

    async def _do(self, call: ServerCall[T], budget: Budget | None = None) -> T:
        exchange = Exchange(call, budget or self._budget(), self._retries, self._clock)
        while True:
            try:
                async with async_deadline(exchange.left()):
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
            body = BodyBuffer(response.headers)
            async for chunk in response.aiter_bytes():
                body.add(chunk)
                exchange.left()
            return Answer(response.status_code, response.headers, body.view())
        finally:
            await response.aclose()
