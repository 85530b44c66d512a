"""One request on its way: what is known of it, and how it is answered."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import orjson

from tpeft_deploy.runtime.server.access import Principal
from tpeft_deploy.runtime.server.exchange import Exchange
from tpeft_deploy.runtime.server.statuses import MethodNotAllowed, status_of

__all__ = ["Exchanged", "send_error"]

_log = logging.getLogger("tpeft_deploy.server")
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Exchanged:
    """What is known of a request while it is answered; see `exchange.Exchange`."""

    __slots__ = (
        "_began",
        "bytes_in",
        "bytes_out",
        "headers",
        "method",
        "principal",
        "request_id",
        "route",
        "started",
        "status",
        "task",
    )

    def __init__(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._began = time.perf_counter()
        self.method = method
        self.headers: Mapping[bytes, bytes] = dict(headers)
        self.route = "unknown"
        self.principal: Principal | None = None
        self.task = ""
        self.status = 0
        self.started = False
        self.bytes_in = 0
        self.bytes_out = 0
        self.request_id = _request_id(self.headers.get(b"x-request-id"))

    @property
    def authorization(self) -> str | None:
        """The header of that name."""
        found = self.headers.get(b"authorization")
        return None if found is None else found.decode("latin-1")

    async def send(self, send: _Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer."""
        self.status = status
        self.started = True
        self.bytes_out = len(body)
        headers.append((b"content-length", b"%d" % len(body)))
        headers.append((b"x-request-id", self.request_id))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def exchange(self) -> Exchange:
        """The request and its answer, once it was answered."""
        own = self.principal
        return Exchange(
            protocol="http",
            method=self.method,
            route=self.route,
            status=self.status,
            tenant="" if own is None else own.tenant,
            role="" if own is None else own.role.value,
            key="" if own is None else own.key,
            task=self.task,
            seconds=time.perf_counter() - self._began,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            request_id=self.request_id.decode("latin-1"),
            traceparent=self.headers.get(b"traceparent", b"").decode("latin-1"),
        )


async def send_error(error: Exception, exchanged: Exchanged, send: _Send) -> None:
    """Tell a client about an error; what the server did not expect goes to the log."""
    status = status_of(error)
    if status.http == 500:
        _log.error("%s %s failed, request %s", exchanged.method, exchanged.route, exchanged.request_id, exc_info=error)
    headers = [(b"content-type", b"application/json")]
    if status.retry_after is not None:
        headers.append((b"retry-after", b"%d" % status.retry_after))
    if status.http == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    text = status.text.encode("utf-8", "replace").decode()
    await exchanged.send(send, status.http, headers, orjson.dumps({"error": text}))


def _request_id(given: bytes | None) -> bytes:
    # A client's own goes into logs and back into a header: only if it can do no harm there.
    if given and len(given) <= 128 and all(33 <= byte < 127 for byte in given):
        return given
    return secrets.token_hex(8).encode()
