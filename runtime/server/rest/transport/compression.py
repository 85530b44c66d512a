"""Compression and bounded decompression of bodies with gzip and deflate."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.tenancy.intake import Hold
from tpeft_deploy.runtime.server.v2.offload import PIECE, Offload

__all__ = ["compress", "decompress", "encoding_for", "is_compressed"]

_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # deflate means the zlib format, which tritonclient sends
_SMALLEST = 1024  # smaller bodies do not get shorter
_STEP = 1 << 20  # bytes decompressed at once; memory is reserved before each step


def is_compressed(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a body has a Content-Encoding."""
    return headers.get(b"content-encoding", b"identity").strip().lower() not in {b"identity", b""}


async def decompress(
    headers: Mapping[bytes, bytes], body: bytes | bytearray, limit: int, hold: Hold, offload: Offload
) -> bytes | bytearray:
    """Decompress a body; in `hold`, the memory of the result replaces that of the compressed body.

    Raises:
        Unsupported: an encoding other than gzip, deflate and identity.
        ProtocolError: the body is not in that encoding.
        TooLarge: the result is larger than `limit` bytes; no more than that is ever held.
        QuotaExceeded, Unavailable: the memory budget is used up.
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
    """Incremental decompressor of one body."""

    def __init__(self, encoding: bytes, body: bytes | bytearray) -> None:
        self._encoding = encoding.decode()
        self._stream = zlib.decompressobj(_WINDOWS[encoding])
        self._body = memoryview(body)
        self._at = 0
        self._empty = False

    @property
    def ended(self) -> bool:
        """Whether there is no more output, even if the body is truncated."""
        return self._stream.eof or self._empty

    def step(self, size: int) -> bytes:
        """Return at most `size` more decompressed bytes."""
        parts: list[bytes] = []
        while size > 0 and not self.ended:
            # zlib copies the unconsumed rest of each piece, so pieces are small.
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
        """Reject truncated bodies and trailing data."""
        rest = self._stream.unused_data or self._at < len(self._body)
        if not self._stream.eof or rest:
            raise ProtocolError("read a body", expected=f"one whole stream of {self._encoding}", got="less, or more")


def encoding_for(headers: Mapping[bytes, bytes], size: int) -> bytes | None:
    """Return the accepted encoding for a response of `size` bytes; None if it would not get shorter."""
    accepted = headers.get(b"accept-encoding")
    if accepted is None or size < _SMALLEST:
        return None
    names = {part.partition(b";")[0].strip().lower() for part in accepted.split(b",") if b"q=0" not in part}
    return next((name for name in (b"gzip", b"deflate") if name in names), None)


def compress(encoding: bytes, parts: Sequence[Any]) -> bytes:
    """Compress the concatenated parts of a body."""
    return b"".join(_compressed(encoding, parts))


def _compressed(encoding: bytes, parts: Sequence[Any]) -> Iterator[bytes]:
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOWS[encoding])
    for part in parts:
        view = memoryview(part).cast("B")
        for at in range(0, len(view), _STEP):
            yield stream.compress(view[at : at + _STEP])
    yield stream.flush()
