"""A connection of uvicorn's that reads no head without end: memory is taken for one before anybody sees a key."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tpeft_deploy.runtime.server.rest.transport.seats import Seat, Seats

__all__ = ["Connection"]

_BYTES = 1 << 16  # beyond the read that a head, an extension of a chunk, or trailers begin in
_FIELDS = 128  # headers of a request and its trailers
_LEAST = 1 << 16  # bytes of a body or an answer within `stall_seconds`
_HEALTH = b"/v2/health/"
# Of two of them each reader may take another.
_ONCE = {b"host", b"transfer-encoding", b"content-type", b"content-encoding", b"inference-header-content-length"}


class _Phase(Enum):
    """What a connection waits for."""

    REQUEST = auto()  # its first byte
    HEAD = auto()  # the rest of it
    BODY = auto()
    SERVER = auto()
    REST = auto()  # of a body that nobody reads any more
    READER = auto()  # the client, to take an answer
    END = auto()


class Connection(HttpToolsProtocol):
    """Answers 431 where more than 64 KiB come that are no body, or more than 128 fields, before a request is whole.

    Args:
        seats: limits, and who waits for a request.
        seat: of this connection.
        uvicorn: what uvicorn gives to its connections.
    """

    def __init__(self, seats: Seats, seat: Seat, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._seats = seats
        self._seat = seat
        self._beyond = 0  # bytes since the last piece of a body, or the last end of a head
        self._heard = 0  # bytes
        self._requests = 0  # heads that were whole
        self._in_body = False
        self._drained = 0  # how often the client took what it was to take before more was written
        self._mark: object = None  # phase and request at the last look but one that was the same
        self._since = 0.0
        self._progress = (0, 0, 0)

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        super().connection_made(transport)
        self._seat.end = transport.abort

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._seats.leave(self._seat)

    def resume_writing(self) -> None:
        """Go on with an answer."""
        self._drained += 1
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        self._seats.waiting.pop(self._seat, None)
        self._beyond += len(data)
        self._heard += len(data)
        super().data_received(data)
        # Looked at afterwards: what comes at once is mostly a body, which is counted where it is read.
        scope = getattr(self.cycle, "scope", None)  # there is no cycle before the first request
        if scope is not None and scope is self.scope and not self.cycle.more_body:
            self._beyond = 0  # a whole request, as most are when they come
        elif self._beyond > _BYTES or self._has_too_many():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "more headers than this server takes")
        elif self._is_refused():
            self._drain(len(data))

    def on_headers_complete(self) -> None:
        """Answer the request that a head is of."""
        if len(self.headers) > _FIELDS:
            raise OverflowError  # which ends the reading
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
        super().on_headers_complete()
        self.headers = [*self.headers]  # trailers are counted here, and are not among the request's own
        if self._seat.spare:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._beyond = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._in_body = False
        self._seats.refused.pop(self._seat, None)
        if self.cycle.response_complete:
            self._wait()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request; without a timer for each, as uvicorn has: `look` does that."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait()

    def look(self, now: float) -> None:
        """End the connection if its client has had its time.

        Args:
            now: time in seconds, of any clock.
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
        """Refuse what cannot be read; `msg` says no more than that."""
        if not self._has_too_many():
            self._refuse(HTTPStatus.BAD_REQUEST, "read a request: it is not what HTTP says")

    def _wait(self) -> None:
        """Be the last to go of those that wait for a request, if this does."""
        if not self._in_body and not self._seat.spare:
            self._seats.waiting[self._seat] = None

    def _is_refused(self) -> bool:
        """Whether a body comes that was answered already."""
        cycle = getattr(self, "cycle", None)  # there is none before the first request
        return self._in_body and cycle is not None and bool(cycle.response_complete)

    def _drain(self, size: int) -> None:
        """Read no more of a refused body for a while: clients that send faster wait."""
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
        cycle = getattr(self, "cycle", None)  # there is none before the first request
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
        """Time that a phase may take without `_has_moved`."""
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
        return bool(self.headers) and len(self.headers) > _FIELDS  # there are none before a first request

    def _refuse(self, status: HTTPStatus, text: str, more: str = "") -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": text})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n{more}"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _problem(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """What a proxy may read in another way than this server, and the parser takes."""
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
