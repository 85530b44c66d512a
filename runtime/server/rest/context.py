"""Context of an HTTP request: reads its headers, parameters and body, and sends the response."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import orjson
from starlette.requests import ClientDisconnect, Request

from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import ProtocolError, TooLarge, Unauthenticated, Unavailable
from tpeft_deploy.runtime.server.context import GONE, RequestContext
from tpeft_deploy.runtime.server.openai import errors
from tpeft_deploy.runtime.server.openai.sse import EventStream, event
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.server.rest.transport.compression import decompress
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.statuses import MethodNotAllowed, Status, status_of
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["Headers", "HttpContext", "Receive", "Response", "Scope", "Send"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Response = tuple[int, Headers, Sequence[bytes]]
"""Status, headers and parts of the body."""

B = TypeVar("B", bound=Body)
_DIGITS = 19
_PIECE = 1 << 20
_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # for nginx, which would hold events back
]
_LAST_SECONDS = 1.0  # for the last event of a stream that the server ends
_SHOWN = 200
_log = logging.getLogger("tpeft_deploy.server")


class HttpContext(RequestContext):
    """Context of an HTTP request.

    Args:
        core: the server's operations.
        limits: limits of bodies.
        intake: budgets and threads of the server.
        scope: ASGI scope.
        receive: ASGI receive function.

    Attributes:
        headers: request headers, names in lower case.
        parameters: path parameters.
        started: whether the response was begun.
        extra: headers of the response, whatever it is.
    """

    __slots__ = ("_request", "core", "extra", "headers", "limits", "parameters", "receive", "scope", "started")

    def __init__(self, core: Service, limits: RestLimits, intake: Intake, scope: Scope, receive: Receive) -> None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        traceparent = headers[b"traceparent"].decode("latin-1") if b"traceparent" in headers else ""
        super().__init__("http", scope["method"], intake, headers.get(b"x-request-id", b""), traceparent)
        self.headers = headers
        self.core = core
        self.limits = limits
        self.scope = scope
        self.receive = receive
        self.parameters: Mapping[str, str] = {}
        self.started = False
        self.extra: Headers = []
        self._request: Request | None = None

    @property
    def authorization(self) -> str | None:
        """The Authorization header.

        Raises:
            Unauthenticated: the header is repeated.
        """
        given = self.scope["headers"]
        if len(self.headers) < len(given) and sum(name == b"authorization" for name, _ in given) > 1:
            raise Unauthenticated("authenticate", expected="one header Authorization", got="two")
        found = self.headers.get(b"authorization")
        return None if found is None else found.decode("latin-1")

    @property
    def request(self) -> Request:
        """Starlette request."""
        if self._request is None:
            self._request = Request(self.scope, self.receive)
        return self._request

    @property
    def declared(self) -> int:
        """Declared size of the body in bytes; 0 if unknown."""
        given = self.headers.get(b"content-length", b"")
        return 0 if not given.isdigit() else int(given) if len(given) < _DIGITS else sys.maxsize

    def path(self, name: str) -> str:
        """Return a path parameter; an empty string if the route has none of that name."""
        return self.parameters.get(name, "")

    def query(self, name: str) -> str | None:
        """Return a query parameter."""
        return self.request.query_params.get(name)

    @property
    def owner(self) -> str | None:
        """The query parameter `tenant`, which names the owner of a task."""
        found = self.query("tenant")
        if found is not None and not is_name(found):
            raise ProtocolError("read the query parameter 'tenant'", expected="a tenant's name", got=quoted(found))
        return found

    def number(self, name: str) -> int | None:
        """Return an integer query parameter."""
        found = self.query(name)
        if found is None:
            return None
        if not (found.isascii() and found.isdigit() and len(found) < 10):
            raise ProtocolError(f"read the query parameter {name!r}", expected="a whole number", got=quoted(found))
        return int(found)

    async def body(self, limit: int, fix: str | None = None) -> bytes | bytearray:
        """Read and decompress the body; memory is reserved before it is read.

        Args:
            limit: maximum size, before and after decompression.
            fix: advice for the error about a larger body.

        Raises:
            TooLarge: the body is larger.
            QuotaExceeded, Unavailable: the memory budget is used up.
        """
        declared = self.declared
        if declared > limit:
            raise TooLarge("read a body", expected=f"at most {limit:,} bytes", got=f"{declared:,}", fix=fix)
        self.memory.take(declared)
        body = bytearray()
        async for part in self.request.stream():
            if len(body) + len(part) > limit:
                raise TooLarge("read a body", expected=f"at most {limit:,} bytes", got="more", fix=fix)
            body += part
            if len(body) > self.memory.size:
                self.memory.resize(len(body))
        return await decompress(self.headers, body, limit, self.memory, self.intake.offload) if body else body

    async def json(self) -> dict[str, Any]:
        """Read the body as a JSON object; an empty body is {}."""
        return self.parsed(await self.body(self.limits.document_bytes))

    async def read(self, kind: type[B]) -> B:
        """Read the body as JSON of type `kind`; reject unknown fields and other types."""
        return self.decoded(await self.body(self.limits.document_bytes), kind)

    @staticmethod
    def decoded(text: bytes | bytearray, kind: type[B]) -> B:
        """Decode a JSON body of type `kind`; an empty body is {}."""
        try:
            return msgspec.json.decode(text if text.strip() else b"{}", type=kind)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            fields = ", ".join(name for name in kind.__struct_fields__ if name not in kind.unlisted)
            raise ProtocolError("read a body", expected=f"fields {fields}", problem=_line(error)) from None

    @staticmethod
    def parsed(text: bytes | bytearray) -> dict[str, Any]:
        """Parse a JSON object; an empty body is {}."""
        if not text.strip():
            return {}
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ProtocolError("read a body", expected="JSON", problem=str(error)) from None
        if not isinstance(found, dict):
            raise ProtocolError("read a body", expected="a JSON object", got=type(found).__name__)
        return found

    async def send(self, send: Send, status: int, headers: Headers, parts: Sequence[bytes]) -> None:
        """Send a response; a large body is sent in pieces, each after the previous one."""
        self.status = status
        self.started = True
        self.bytes_out = sum(map(len, parts))
        headers += (*self.extra, (b"content-length", b"%d" % self.bytes_out), (b"x-request-id", self.id_bytes))
        try:
            await self._write(send, status, headers, parts)
        except (RuntimeError, OSError):  # raised by event loops for a closed connection
            _log.debug("request %s went away before its answer", self.request_id, exc_info=True)
            self.status = GONE

    async def send_events(self, send: Send, stream: EventStream) -> None:
        """Send a stream of events; each is given to the connection once it takes more, and an error is the last."""
        self.status, self.started = 200, True
        headers = [*_EVENTS, *self.extra, (b"x-request-id", self.id_bytes)]

        async def out(message: MutableMapping[str, Any]) -> None:
            try:
                await send(message)
            except (RuntimeError, OSError):  # raised by event loops for a closed connection
                raise ClientDisconnect from None

        async def part(body: bytes, *, more: bool = True) -> None:
            if body or not more:
                self.bytes_out += len(body)
                await out({"type": "http.response.body", "body": body, "more_body": more})

        async with aclosing(stream.rest) as rest:
            try:
                await out({"type": "http.response.start", "status": 200, "headers": headers})
                await part(stream.first)
                async for body in rest:
                    await part(body)
                await part(b"", more=False)
            except ClientDisconnect:
                raise
            except asyncio.CancelledError:
                await rest.aclose()
                stops = Unavailable("answer a request", problem="the server stops", fix="Send it again.")
                with suppress(TimeoutError, ClientDisconnect):  # the client may have left, or read nothing
                    async with asyncio.timeout(_LAST_SECONDS):
                        await part(event(self._error(stops, status_of(stops))), more=False)
                raise
            except Exception as error:
                await part(event(self._error(error, self._status_of(error))), more=False)

    async def _write(self, send: Send, status: int, headers: Headers, parts: Sequence[bytes]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if self.bytes_out <= _PIECE:
            await send({"type": "http.response.body", "body": parts[0] if len(parts) == 1 else b"".join(parts)})
            return
        for part in parts:
            for at in range(0, len(part), _PIECE):
                await send({"type": "http.response.body", "body": bytes(part[at : at + _PIECE]), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def refusal(self, error: Exception) -> Response:
        """Convert an error to status, headers and body; unexpected errors are logged."""
        status = self._status_of(error)
        headers: Headers = [(b"content-type", b"application/json")]
        if status.retry_after is not None:
            headers.append((b"retry-after", b"%d" % status.retry_after))
        if status.http == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", error.allowed.encode()))
        return status.http, headers, [orjson.dumps(self._error(error, status))]

    def _status_of(self, error: Exception) -> Status:
        status = status_of(error)
        if status.http == 500:
            _log.error("%s %s failed, request %s", self.method, self.route, self.request_id, exc_info=error)
        return status

    def _error(self, error: Exception, status: Status) -> dict[str, object]:
        text = _unicode(status.text)
        if self.scope.get("path", "").startswith(errors.PREFIX):
            return errors.document(error, replace(status, text=text), self.task)
        return {"error": text}


def _unicode(text: str) -> str:
    """Replace lone surrogates, which JSON cannot have."""
    return text.encode("utf-8", "replace").decode()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
