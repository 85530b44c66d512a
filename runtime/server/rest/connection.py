"""A connection of uvicorn's that reads no head without end: memory is taken for one before anybody sees a key."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Connection"]

_BYTES = 1 << 16  # beyond the read that a head, an extension of a chunk, or trailers begin in
_FIELDS = 128  # headers of a request and its trailers


class Connection(HttpToolsProtocol):
    """Answers 431 where more than 64 KiB come that are no body, or more than 128 fields, before a request is whole."""

    _beyond = 0  # bytes since the last piece of a body, or the last end of a head

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        self._beyond += len(data)
        super().data_received(data)
        # Looked at afterwards: what comes at once is mostly a body, which is counted where it is read.
        scope = getattr(self.cycle, "scope", None)  # there is no cycle before the first request
        if scope is not None and scope is self.scope and not self.cycle.more_body:
            self._beyond = 0  # a whole request, as most are when they come
        elif self._beyond > _BYTES or self._has_too_many():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "more headers than this server takes")

    def on_headers_complete(self) -> None:
        """Answer the request that a head is of."""
        if len(self.headers) > _FIELDS:
            raise OverflowError  # which ends the reading
        self._beyond = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._beyond = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read; `msg` says no more than that."""
        if not self._has_too_many():
            self._refuse(HTTPStatus.BAD_REQUEST, "read a request: it is not what HTTP says")

    def _has_too_many(self) -> bool:
        return bool(self.headers) and len(self.headers) > _FIELDS  # there are none before a first request

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": text})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
