"""The client for programs that wait for each answer."""

from __future__ import annotations

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

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Calls a server; safe to use from several threads.

    Refusals are raised as the errors of `tpeft_deploy.errors` with the server's own text: InputError (400),
    Unauthenticated, Forbidden, NotFound, Conflict, TooLarge, QuotaExceeded (with `retry_after`), Unsupported, QueueFull
    or Unavailable (503), DeadlineExceeded (504, or no answer within the timeout), else ServerError.

    What reads or infers is sent again when the server says that it has no room now (429 with a time, 503), after the
    time that it names, and as long as the timeout allows.  Whatever it is for, a request is sent again when there was
    no connection to send it on; what changes the server is sent again in no other case.

    Args:
        url: of the server.
        key: by default what TPEFT_KEY holds; none of both for a server without keys.
        timeout: seconds that a call may take, retries included; None: without end.
        retries: how often a request is sent again.
        verify: False checks no certificate; a path names the certificates that are trusted.
        tenant: whose tasks an admin's calls are about; by default the key's own tenant.
        transport: sends in place of the network.
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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        settings = settings_of(url, key, verify)
        self._http = httpx.Client(
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
    def infer(
        self,
        inputs: Mapping[str, object],
        task: str = "base",
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> dict[str, Array]: ...

    @overload
    def infer(
        self,
        inputs: Mapping[str, object],
        *,
        tasks: Sequence[str],
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Outputs: ...

    def infer(
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
            inputs: input name -> array with the model's dtype, as nothing is converted; bfloat16 as uint16.
            task: one task for all rows, `name` or `name@version`; the base when neither `task` nor `tasks` is given.
            tasks: one task per row.
            outputs: names of those that are wanted; None: all.
            timeout: seconds; the server learns how many are left and gives up when they are over.
            priority: a tenant's requests with a smaller one are served first.

        Returns:
            Output name -> array, which may be written to; of `bytes` objects for BYTES.  With `tasks`, an output whose
            rows differ in size is a list of arrays, one a row.

        Raises:
            InputError: inputs, tasks or outputs do not fit the model.
            NotFound: no such task, or none that the key may see.
            QuotaExceeded, QueueFull, Unavailable, DeadlineExceeded: not now, after all retries.
        """
        wish = Wish(inputs, task, tasks, outputs, priority)
        budget = self._budget(timeout)
        facts = self._ask_facts(budget) if wish.needs_facts else None
        return self._do(inference.infer(wish, facts), budget)

    def tasks(self) -> list[Document]:
        """The tasks that the key sees, with their versions and aliases."""
        return self._do(calls.tasks(self._tenant))

    def task(self, name: str) -> Document:
        """One of them."""
        return self._do(calls.task(name, self._tenant))

    def register(
        self, name: str, path: str | os.PathLike[str], *, alias: str = "current", timeout: float | None = None
    ) -> Document:
        """Give the server an adapter as a new version of a task, checked and ready when this returns.

        Args:
            name: of the task.
            path: a .safetensors file, or a directory that PEFT saved; it is streamed.
            alias: that stands for the new version from now on.
            timeout: seconds that sending and checking may take.

        Raises:
            FormatError: the files are pickles, or no adapter; nothing was sent.
            InputError: the adapter does not fit the server's base.
            Conflict, QuotaExceeded, TooLarge: the server does not take it.
        """
        return self._do(calls.register(name, path, alias, self._tenant), self._budget(timeout))

    def point(self, name: str, alias: str, version: int | str, *, expected: int | str | None = None) -> Document:
        """Let an alias of a task stand for another version; requests in flight finish on the earlier one.

        Args:
            name: of the task.
            alias: alias that changes.
            version: number or alias of what it is to stand for.
            expected: number of the version that it has to stand for now; any by default.

        Raises:
            Conflict: it stands for another one.
        """
        return self._do(calls.point(name, alias, version, self._tenant, expected))

    def rollback(self, name: str, alias: str = "current", *, expected: int | str | None = None) -> Document:
        """Let an alias stand again for what it stood for before; a second time undoes that.

        Args:
            name: of the task.
            alias: alias that changes.
            expected: number of the version that it has to stand for now, so that nobody's later change is undone; any
                by default.

        Raises:
            Conflict: it stands for another one, or stood for none before.
        """
        return self._do(calls.rollback(name, alias, self._tenant, expected))

    def history(self, name: str, alias: str = "current", limit: int = 100) -> list[Document]:
        """What an alias stands for and stood for before, since when and by which key; the newest first."""
        return self._do(calls.history(name, alias, limit, self._tenant))

    def delete(self, name: str, version: int | str | None = None) -> None:
        """Delete a task, or one version that no alias stands for."""
        return self._do(calls.delete(name, version, self._tenant))

    def publish(self, name: str, tenant: str | None = None) -> Document:
        """Give a tenant's task to all tenants; by default one of the client's tenant.  Needs an admin's key."""
        return self._do(calls.publish(name, self._tenant if tenant is None else tenant))

    def pin(self, name: str, folded: bool = False) -> Document:
        """Keep a task's current version on the device, or in a session of its own."""
        return self._do(calls.pin(name, folded, self._tenant))

    def unpin(self, name: str) -> None:
        """Let it leave the device again."""
        return self._do(calls.unpin(name, self._tenant))

    def ready(self, model: str | None = None) -> bool:
        """Whether the server takes requests, at all or for one model; Unavailable when there is no connection."""
        return self._do(calls.ready(model))

    def live(self) -> bool:
        """Whether the server's process works; Unavailable when there is no connection."""
        return self._do(calls.live())

    def metadata(self, model: str | None = None) -> Document:
        """Of the server, or the versions, inputs and outputs of a model."""
        return self._do(calls.metadata(model))

    def statistics(self, model: str | None = None) -> Document:
        """Counts and times of all models that the key sees, or of one."""
        return self._do(calls.statistics(model))

    def keys(self) -> list[Document]:
        """Ids, tenants, roles and times of keys; never the keys.  Needs an admin's key, as all that follow."""
        return self._do(calls.keys(self._tenant))

    def create_key(self, tenant: str, role: str, *, expires_in: float | None = None) -> Document:
        """A new key, which is in the answer this once, under `key`.

        Args:
            tenant: whose it is.
            role: "infer", "deploy" or "admin".
            expires_in: seconds; None: never.
        """
        return self._do(calls.create_key(tenant, role, expires_in))

    def revoke_key(self, id: str) -> None:
        """Let the server refuse a key from now on."""
        return self._do(calls.revoke_key(id))

    def tenants(self) -> list[Document]:
        """Tenants, their quotas and what they use."""
        return self._do(calls.tenants())

    def set_tenant(self, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """Set quotas of a tenant, None being no limit.

        They are requests_per_s, rows_per_s, queue_share, adapters, bytes, pins, folded, and weight.
        """
        return self._do(calls.set_tenant(tenant, quota))

    def audit(self, limit: int = 100, before: int | None = None) -> list[Document]:
        """The newest changes first; `before` is the id of the last one of the page before."""
        return self._do(calls.audit(limit, before))

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

    def _ask_facts(self, budget: Budget) -> Facts:
        if self._facts is None:
            self._facts = self._do(inference.facts_of(self._do(inference.name_of(), budget)), budget)
        return self._facts

    def _do(self, call: Call[T], budget: Budget | None = None) -> T:
        exchange = Exchange(call, budget or self._budget(), self._retries, self._clock)
        while True:
            try:
                answer = self._send(exchange)
            except httpx.RequestError as error:
                wait = exchange.failed(error)
            else:
                again = exchange.answered(answer)
                if again is None:
                    return exchange.result(answer)
                wait = again
            self._clock.sleep(wait)

    def _send(self, exchange: Exchange[T]) -> Answer:
        response = self._http.send(exchange.request(self._http), stream=True)
        try:
            landing = Landing(response.headers)
            for chunk in response.iter_bytes():
                landing.add(chunk)
                exchange.left()
            return Answer(response.status_code, response.headers, landing.body())
        finally:
            response.close()
