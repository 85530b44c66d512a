"""Streaming of uploaded files, from the parts of a form or a single body; neither is held in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from tpeft_deploy.errors import Conflict, ProtocolError, TooLarge
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.v2.messages import UploadPart
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["parts"]

_PARTS = 4  # maximum parts of a form; an upload has two


async def parts(context: HttpContext) -> AsyncIterator[UploadPart]:
    """Yield the files of an upload: the parts of a form, or the body itself as the weights.

    Raises:
        TooLarge: the upload exceeds the limit.
        QuotaExceeded, Unavailable: the disk budget is used up; nothing was read.
        ProtocolError: the form is malformed or has fields other than files.
        Conflict: the client disconnected.
    """
    kind = context.request.headers.get("content-type", "")
    pieces = _counted(context)
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        yield "weights", pieces
        return
    form = _Form(kind, pieces)
    while (name := await form.next_part()) is not None:
        yield name, form.pieces()


async def _counted(context: HttpContext) -> AsyncIterator[bytes]:
    """Yield the body; disk space is reserved among unfinished uploads before it is read."""
    limit = context.limits.upload_bytes + context.limits.document_bytes
    declared = context.declared
    if declared > limit:
        raise TooLarge("read an upload", expected=f"at most {limit:,} bytes", got=f"{declared:,}")
    context.staging.take(declared)
    size = 0
    try:
        async for part in context.request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge("read an upload", expected=f"at most {limit:,} bytes", got="more")
            if size > context.staging.size:
                context.staging.resize(size)
            yield part
    except ClientDisconnect:
        raise Conflict("read an upload", problem="the client went away before its end") from None


class _Form:
    """Incremental parser of the parts of a form, in order."""

    def __init__(self, kind: str, pieces: AsyncIterator[bytes]) -> None:
        boundary = parse_options_header(kind)[1].get(b"boundary")
        if boundary is None:
            raise ProtocolError("read an upload", problem="Missing boundary in multipart.")
        self._pieces = pieces
        self._events: deque[tuple[str, bytes]] = deque()
        self._field = self._value = self._disposition = b""
        self._count = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part,
                    "on_part_data": lambda data, start, end: self._events.append(("data", data[start:end])),
                    "on_part_end": lambda: self._events.append(("end", b"")),
                    "on_header_field": self._on_field,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                },
            )
        except FormParserError:
            raise _malformed() from None

    async def next_part(self) -> str | None:
        """Return the name of the next part; None at the end."""
        while (event := await self._next()) is not None:
            if event[0] == "part":
                return event[1].decode("utf-8", "replace")
        return None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the content of the current part."""
        while (event := await self._next()) is not None:
            if event[0] == "end":
                return
            yield event[1]
        raise _malformed()

    async def _next(self) -> tuple[str, bytes] | None:
        while not self._events:
            piece = await anext(self._pieces, None)
            try:
                if piece is None:
                    self._parser.finalize()
                    return None
                self._parser.write(piece)
            except FormParserError:
                raise _malformed() from None
        return self._events.popleft()

    def _on_part(self) -> None:
        self._count += 1
        if self._count > _PARTS:
            raise ProtocolError("read an upload", expected=f"at most {_PARTS} parts", got="more")
        self._disposition = b""

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name")
        if name is None:
            problem = 'The Content-Disposition header field "name" must be provided.'
            raise ProtocolError("read an upload", problem=problem)
        if b"filename" not in options:
            shown = quoted(name.decode("utf-8", "replace"))
            raise ProtocolError(f"read part {shown}", expected="a file", got="a field", fix="curl -F NAME=@FILE")
        self._events.append(("part", name))


def _malformed() -> ProtocolError:
    return ProtocolError("read an upload", problem="Invalid multipart data.")
