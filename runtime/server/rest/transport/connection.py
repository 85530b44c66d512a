"""uvicorn connection with bounded request heads, which take memory before the client is authenticated."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tpeft_deploy.runtime.server.rest.transport.body_reader import BodyReader
from tpeft_deploy.runtime.server.rest.transport.seats import Seat, Seats

__all__ = ["BodyRead", "Connection", "READ_BODY"]

BodyRead = Callable[[bytes, int, int], Awaitable[bytes | memoryview]]
READ_BODY = "tpeft_deploy.read_body"
"""ASGI extension, a `BodyRead`: see `Connection.read_body`."""
_BYTES = 1 << 16  # not counting the read in which a head, a chunk extension, or trailers begin
_FIELDS = 128  # maximum headers and trailers of a request
_LEAST = 1 << 16  # minimum bytes of a body or a response within `stall_seconds`
_HEALTH = b"/v2/health/"
# Readers disagree on which of two duplicates applies.
_ONCE = {b"host", b"transfer-encoding", b"content-type", b"content-encoding", b"inference-header-content-length"}


class _Phase(Enum):
    """Event that a connection waits for."""

    REQUEST = auto()  # first byte of a request
    HEAD = auto()  # rest of the head
    BODY = auto()
    SERVER = auto()
    REST = auto()  # rest of a body that is discarded
    READER = auto()  # client, to read a response
    END = auto()


class Connection(HttpToolsProtocol):
    """HTTP connection that responds 431 to a request with more than 64 KiB outside its body, or more than 128 fields.

    Args:
        seats: connection limits, and the connections that wait for a request.
        seat: seat of this connection.
        uvicorn: arguments that uvicorn passes to its connections.
    """

    def __init__(self, seats: Seats, seat: Seat, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._seats = seats
        self._seat = seat
        self._beyond = 0  # bytes since the last piece of a body or the end of the last head
        self._heard = 0  # bytes
        self._requests = 0  # complete heads
        self._in_body = False
        self._drained = 0  # times that the client read enough for writing to resume
        self._mark: object = None  # phase and request since `_since`
        self._since = 0.0
        self._progress = (0, 0, 0)
        self._extensions: Any = {READ_BODY: self.read_body}
        self._reader: BodyReader | None = None

    def connection_made(self, transport: Any) -> None:
        """Register the connection."""
        super().connection_made(transport)
        self._seat.end = transport.abort

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the seat."""
        super().connection_lost(exc)
        self._seats.leave(self._seat)

    def resume_writing(self) -> None:
        """Resume writing a response."""
        self._drained += 1
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse received data."""
        self._seats.waiting.pop(self._seat, None)
        self._beyond += len(data)
        self._heard += len(data)
        super().data_received(data)
        # Checked after parsing: most of a read is usually a body, and `on_body` resets the count.
        scope = getattr(self.cycle, "scope", None)  # unset before the first request
        if scope is not None and scope is self.scope and not self.cycle.more_body:
            self._beyond = 0  # complete request, the usual case
        elif self._beyond > _BYTES or self._has_too_many():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "more headers than this server takes")
        elif self._is_refused():
            self._drain(len(data))

    def on_headers_complete(self) -> None:
        """Validate a complete head and start its request."""
        if len(self.headers) > _FIELDS:
            raise OverflowError  # stops the parser
        problem = _problem(self.parser.get_http_version(), self.headers)
        if problem is not None:
            self._refuse(HTTPStatus.BAD_REQUEST, f"read a request: {problem}")
            raise OverflowError
        self._beyond = 0
        self._requests += 1
        self._in_body = True
        if self._seat.spare and not self.url.startswith(_HEALTH):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "there is no room for a connection", "retry-after: 1\r\n")
            raise OverflowError
        self.scope["extensions"] = self._extensions
        super().on_headers_complete()
        self.headers = [*self.headers]  # the parser appends trailers to the copy, not to the request
        if self._seat.spare:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Receive a piece of a body."""
        self._beyond = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Receive the end of a request."""
        self._in_body = False
        self._seats.refused.pop(self._seat, None)
        if self.cycle.response_complete:
            self._wait()
        super().on_message_complete()

    async def read_body(self, first: bytes, size: int, tensors: int) -> bytes | memoryview:
        """Read the rest of the body of the request that is being served, past the parser.

        Args:
            first: bytes of the body that were received, fewer than `size`.
            size: length that the request declared.
            tensors: bytes of the body before the first tensor.

        Returns:
            All of the body, or fewer bytes if the client has left.
        """
        cycle = self.cycle
        first += bytes(cycle.body)
        cycle.body = bytearray()
        if not cycle.more_body or cycle.disconnected or self.transport.is_closing():
            return first
        self._reader = reader = BodyReader(self, first, size, tensors, self._advance)
        self._receive_by(reader)
        try:
            while not (reader.is_complete or cycle.disconnected):
                await cycle.message_event.wait()
                cycle.message_event.clear()
        finally:
            self._reader = None
            if not reader.is_complete:
                self.transport.close()  # the parser has not seen where the body ends
        return reader.body

    def _advance(self, size: int) -> None:
        self._heard += size
        if self._reader is not None and self._reader.is_complete:
            # The parser still waits for this body; what follows is for one that has seen nothing.
            self.parser = _new_parser(self)
            self._receive_by(self)
            self.on_message_complete()

    def _receive_by(self, protocol: asyncio.BaseProtocol) -> None:
        self.flow.pause_reading()  # uvloop chooses between its two ways of reading when reading starts
        self.transport.set_protocol(protocol)
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Continue with the next request; `look` replaces uvicorn's keep-alive timer per request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait()

    def look(self, now: float) -> None:
        """Close the connection if its client has exceeded its time limit.

        Args:
            now: time of a monotonic clock in seconds.
        """
        phase = self._phase()
        mark = (phase, self._requests)
        progress = (self._heard, self._drained, -self.transport.get_write_buffer_size())
        if mark != self._mark:
            self._mark, self._since, self._progress = mark, now, progress
        elif now - self._since >= self._seconds(phase):
            if self._has_moved(phase, progress):
                self._since, self._progress = now, progress
            else:
                self._cut(phase)

    def send_400_response(self, msg: str) -> None:
        """Reject an unreadable request; `msg` contains no further information."""
        if not self._has_too_many():
            self._refuse(HTTPStatus.BAD_REQUEST, "read a request: it is not what HTTP says")

    def _wait(self) -> None:
        """If waiting for a request, become the last eviction victim."""
        if not self._in_body and not self._seat.spare:
            self._seats.waiting[self._seat] = None

    def _is_refused(self) -> bool:
        """Return whether the rest of a body is arriving after its response."""
        cycle = getattr(self, "cycle", None)  # unset before the first request
        return self._in_body and cycle is not None and bool(cycle.response_complete)

    def _drain(self, size: int) -> None:
        """Pause reading of a refused body: backpressure on fast clients."""
        if not self._seat.spare:
            self._seats.refused[self._seat] = None
        seconds = self._seats.drain(size, self.loop.time())
        if seconds > 0 and not self.transport.is_closing():
            self.flow.pause_reading()
            self.loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _phase(self) -> _Phase:
        cycle = getattr(self, "cycle", None)  # unset before the first request
        if self.transport.get_write_buffer_size():
            return _Phase.READER
        if self.transport.is_closing():
            return _Phase.END
        if self._seat in self._seats.waiting:
            return _Phase.REQUEST
        if cycle is None or (cycle.response_complete and not self._in_body):
            return _Phase.HEAD
        if self._is_refused():
            return _Phase.REST
        if not self._in_body or self.flow.read_paused or cycle.waiting_for_100_continue:
            return _Phase.SERVER
        return _Phase.BODY

    def _seconds(self, phase: _Phase) -> float:
        """Return the maximum seconds of a phase without progress according to `_has_moved`."""
        own = self._seats.patience
        if phase is _Phase.SERVER:
            return float("inf")
        if phase is _Phase.HEAD or (phase is _Phase.REQUEST and not self._requests):
            return own.spare_seconds if self._seat.spare else own.head_seconds
        return own.idle_seconds if phase in {_Phase.REQUEST, _Phase.REST} else own.stall_seconds

    def _has_moved(self, phase: _Phase, progress: tuple[int, int, int]) -> bool:
        heard, drained, left = (new - old for new, old in zip(progress, self._progress, strict=True))
        if phase is _Phase.BODY:
            return heard >= _LEAST
        return phase is _Phase.READER and (drained > 0 or left >= _LEAST)

    def _cut(self, phase: _Phase) -> None:
        if phase is _Phase.BODY or (phase is _Phase.HEAD and self._heard):
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time")
        elif phase in {_Phase.READER, _Phase.END}:
            self.transport.abort()
        else:
            self.transport.close()

    def _has_too_many(self) -> bool:
        return bool(self.headers) and len(self.headers) > _FIELDS  # None before the first request

    def _refuse(self, status: HTTPStatus, text: str, more: str = "") -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": text})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n{more}"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _new_parser(protocol: Connection) -> httptools.HttpRequestParser:
    """Return a parser that is set up as uvicorn's."""
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _problem(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """Return a problem of a head that the parser accepts but a proxy may interpret differently."""
    fields = dict(headers)
    if version not in {"1.1", "1.0"}:
        return "expected HTTP 1.0 or 1.1"
    if b"host" not in fields and version == "1.1":
        return "it has no Host"
    if b"transfer-encoding" in fields and (version == "1.0" or fields[b"transfer-encoding"].lower() != b"chunked"):
        return "expected no Transfer-Encoding but chunked, of HTTP 1.1"
    if len(fields) < len(headers):
        names = [name for name, _ in headers]
        twice = next((name for name in _ONCE if names.count(name) > 1), None)
        return None if twice is None else f"it has two headers {twice.decode()}"
    return None
