"""HTTP responses: sending, and conversion of errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import orjson

from tpeft_deploy.errors import Unauthenticated
from tpeft_deploy.runtime.server.telemetry.request_record import TRACEPARENT, RequestRecord, request_id
from tpeft_deploy.runtime.server.v2.statuses import MethodNotAllowed, status_of

__all__ = ["GONE", "HttpRecord", "told"]

_log = logging.getLogger("tpeft_deploy.server")
_PIECE = 1 << 20
GONE = 499
"""Status of a request after its client disconnected; used in logs and metrics only."""
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class HttpRecord(RequestRecord):
    """Request record of an HTTP request, which also sends the response.

    Args:
        method: HTTP method.
        headers: request headers, names in lower case.
    """

    __slots__ = ("_has_two", "_id", "headers", "started")

    def __init__(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        super().__init__("http", method)
        self.headers: Mapping[bytes, bytes] = dict(headers)
        twice = len(self.headers) < len(headers)
        self._has_two = twice and sum(name == b"authorization" for name, _ in headers) > 1
        self.started = False
        self._id = request_id(self.headers.get(b"x-request-id"))

    @property
    def authorization(self) -> str | None:
        """The Authorization header.

        Raises:
            Unauthenticated: the header is repeated.
        """
        if self._has_two:
            raise Unauthenticated("authenticate", expected="one header Authorization", got="two")
        found = self.headers.get(b"authorization")
        return None if found is None else found.decode("latin-1")

    @property
    def request_id(self) -> str:
        """Request id of the client if it is safe to log; else a generated one."""
        return self._id.decode("latin-1")

    @property
    def traceparent(self) -> str:
        """W3C trace context of the caller."""
        return self.headers.get(b"traceparent", b"")[:TRACEPARENT].decode("latin-1")

    async def send(self, send: _Send, status: int, headers: list[tuple[bytes, bytes]], parts: Sequence[bytes]) -> None:
        """Send a response; a large body is sent in pieces, each after the previous one."""
        self.status = status
        self.started = True
        self.bytes_out = sum(map(len, parts))
        headers += ((b"content-length", b"%d" % self.bytes_out), (b"x-request-id", self._id))
        try:
            await self._write(send, status, headers, parts)
        except (RuntimeError, OSError):  # raised by event loops for a closed connection
            _log.debug("request %s went away before its answer", self.request_id, exc_info=True)
            self.status = GONE

    async def _write(
        self, send: _Send, status: int, headers: list[tuple[bytes, bytes]], parts: Sequence[bytes]
    ) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if self.bytes_out <= _PIECE:
            await send({"type": "http.response.body", "body": parts[0] if len(parts) == 1 else b"".join(parts)})
            return
        for part in parts:
            for at in range(0, len(part), _PIECE):
                await send({"type": "http.response.body", "body": bytes(part[at : at + _PIECE]), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def told(error: Exception, record: HttpRecord) -> tuple[int, list[tuple[bytes, bytes]], Sequence[bytes]]:
    """Convert an error to status, headers and body; unexpected errors are logged."""
    status = status_of(error)
    if status.http == 500:
        _log.error("%s %s failed, request %s", record.method, record.route, record.request_id, exc_info=error)
    headers = [(b"content-type", b"application/json")]
    if status.retry_after is not None:
        headers.append((b"retry-after", b"%d" % status.retry_after))
    if status.http == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    text = status.text.encode("utf-8", "replace").decode()
    return status.http, headers, [orjson.dumps({"error": text})]
