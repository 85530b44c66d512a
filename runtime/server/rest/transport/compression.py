"""Bodies in gzip and deflate, both ways, and never more of them than allowed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.tenancy.byte_budget import Hold
from tpeft_deploy.runtime.server.v2.offload import PIECE, Offload

__all__ = ["compress", "decompress", "encoding_for", "is_compressed"]

_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # deflate is zlib's format, as tritonclient sends it
_SMALLEST = 1024  # what is smaller gains nothing
_STEP = 1 << 20  # bytes that come out at once; more are reserved before more come


def is_compressed(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a body has a Content-Encoding."""
    return headers.get(b"content-encoding", b"identity").strip().lower() not in {b"identity", b""}


async def decompress(
    headers: Mapping[bytes, bytes], body: bytes | bytearray, limit: int, hold: Hold, offload: Offload
) -> bytes | bytearray:
    """A body without its `Content-Encoding`; `hold` has what comes out in place of what went in.

    Raises:
        Unsupported: an encoding other than gzip, deflate and identity.
        ProtocolError: it is not in that encoding.
        TooLarge: it is larger than `limit` bytes; no more than that is ever held.
        QuotaExceeded, Unavailable: there is no room for what comes out.
    """
    if not is_compressed(headers):
        return body
    encoding = headers[b"content-encoding"].strip().lower()
    if encoding not in _WINDOWS:
        raise Unsupported("read a body", expected="gzip, deflate or no encoding", got="another Content-Encoding")
    stream = _Stream(encoding, body)
    found: bytes | bytearray = stream.step(PIECE) if len(body) <= PIECE else b""
    hold.take(len(found))
    while not stream.ended and len(found) <= limit:
        step = min(_STEP, limit + 1 - len(found))
        hold.take(step)
        more = await offload.run(hold.tenant, stream.step, step)
        hold.give(step - len(more))
        found = bytearray(found) if isinstance(found, bytes) else found
        found += more
    if len(found) > limit:
        raise TooLarge("read a body", expected=f"at most {limit:,} bytes after decompression", got="more")
    stream.check_end()
    hold.give(len(body))
    return found


class _Stream:
    """One compressed body, decompressed a step at a time."""

    def __init__(self, encoding: bytes, body: bytes | bytearray) -> None:
        self._encoding = encoding.decode()
        self._stream = zlib.decompressobj(_WINDOWS[encoding])
        self._body = memoryview(body)
        self._at = 0
        self._empty = False

    @property
    def ended(self) -> bool:
        """Whether nothing more comes out, be it whole or not."""
        return self._stream.eof or self._empty

    def step(self, size: int) -> bytes:
        """At most so many bytes more."""
        parts: list[bytes] = []
        while size > 0 and not self.ended:
            # What is left over of a piece is copied by zlib: so pieces are small.
            left = self._stream.unconsumed_tail
            piece: bytes | memoryview = left or self._body[self._at : self._at + PIECE]
            if not left:
                self._at += len(piece)
            try:
                parts.append(self._stream.decompress(piece, size))
            except zlib.error:
                raise ProtocolError("read a body", expected=f"bytes in {self._encoding}", got="others") from None
            size -= len(parts[-1])
            self._empty = not parts[-1] and not self._stream.unconsumed_tail and self._at >= len(self._body)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_end(self) -> None:
        """Refuse what is cut off, or goes on behind its end."""
        rest = self._stream.unused_data or self._at < len(self._body)
        if not self._stream.eof or rest:
            raise ProtocolError("read a body", expected=f"one whole stream of {self._encoding}", got="less, or more")


def encoding_for(headers: Mapping[bytes, bytes], size: int) -> bytes | None:
    """The encoding that a client asks for, if any, and an answer of that size gains from."""
    accepted = headers.get(b"accept-encoding")
    if accepted is None or size < _SMALLEST:
        return None
    names = {part.partition(b";")[0].strip().lower() for part in accepted.split(b",") if b"q=0" not in part}
    return next((name for name in (b"gzip", b"deflate") if name in names), None)


def compress(encoding: bytes, parts: Sequence[Any]) -> bytes:
    """The parts of a body, one after the other, in an encoding."""
    return b"".join(_compressed(encoding, parts))


def _compressed(encoding: bytes, parts: Sequence[Any]) -> Iterator[bytes]:
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOWS[encoding])
    for part in parts:
        view = memoryview(part).cast("B")
        for at in range(0, len(view), _STEP):
            yield stream.compress(view[at : at + _STEP])
    yield stream.flush()
