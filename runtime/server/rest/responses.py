"""One request on its way: what is known of it, and how it is answered."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import orjson

from tpeft_deploy.errors import Unauthenticated
from tpeft_deploy.runtime.server.telemetry.request_record import TRACEPARENT, Exchange, request_id
from tpeft_deploy.runtime.server.v2.statuses import MethodNotAllowed, status_of

__all__ = ["GONE", "Exchanged", "told"]

_log = logging.getLogger("tpeft_deploy.server")
_PIECE = 1 << 20
GONE = 499
"""Status of a request whose client went away: nobody sees it but logs and metrics."""
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Exchanged(Exchange):
    """An `Exchange` over HTTP, and the way its answer takes.

    Args:
        method: of HTTP.
        headers: of the request, names in lower case.
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
        """The header of that name.

        Raises:
            Unauthenticated: there are two.
        """
        if self._has_two:
            raise Unauthenticated("authenticate", expected="one header Authorization", got="two")
        found = self.headers.get(b"authorization")
        return None if found is None else found.decode("latin-1")

    @property
    def request_id(self) -> str:
        """The client's own, where it can do no harm in a log; else the server's."""
        return self._id.decode("latin-1")

    @property
    def traceparent(self) -> str:
        """The header of that name."""
        return self.headers.get(b"traceparent", b"")[:TRACEPARENT].decode("latin-1")

    async def send(self, send: _Send, status: int, headers: list[tuple[bytes, bytes]], parts: Sequence[bytes]) -> None:
        """Send a whole answer, of one part or more; a large one goes piece by piece, each after the one before."""
        self.status = status
        self.started = True
        self.bytes_out = sum(map(len, parts))
        headers += ((b"content-length", b"%d" % self.bytes_out), (b"x-request-id", self._id))
        try:
            await self._write(send, status, headers, parts)
        except (RuntimeError, OSError):  # what event loops say of a connection that is closed
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


def told(error: Exception, exchanged: Exchanged) -> tuple[int, list[tuple[bytes, bytes]], Sequence[bytes]]:
    """Status, headers and body that tell a client about an error; what the server did not expect goes to the log."""
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
    return status.http, headers, [orjson.dumps({"error": text})]
