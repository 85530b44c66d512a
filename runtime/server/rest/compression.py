"""Bodies in gzip and deflate, both ways, and never more of them than allowed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported

__all__ = ["compress", "decompress"]

_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # deflate is zlib's format, as tritonclient sends it
_SMALLEST = 1024  # what is smaller gains nothing


def decompress(headers: Mapping[bytes, bytes], body: bytes, limit: int) -> bytes:
    """A body without its `Content-Encoding`.

    Raises:
        Unsupported: an encoding other than gzip, deflate and identity.
        ProtocolError: it is not in that encoding.
        TooLarge: it is larger than `limit` bytes; no more than that is ever held.
    """
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding in {b"identity", b""}:
        return body
    if encoding not in _WINDOWS:
        raise Unsupported("read a body", expected="gzip, deflate or no encoding", got="another Content-Encoding")
    stream = zlib.decompressobj(_WINDOWS[encoding])
    try:
        found = stream.decompress(body, limit + 1)
    except zlib.error:
        raise ProtocolError("read a body", expected=f"bytes in {encoding.decode()}", got="others") from None
    if len(found) > limit:
        raise TooLarge("read a body", expected=f"at most {limit:,} bytes after decompression", got="more")
    if not stream.eof or stream.unused_data:
        raise ProtocolError("read a body", expected=f"one whole stream of {encoding.decode()}", got="less, or more")
    return found


def compress(headers: Mapping[bytes, bytes], body: bytes) -> tuple[bytes | None, bytes]:
    """The encoding that a client asks for, if any, and the body in it."""
    accepted = headers.get(b"accept-encoding")
    if accepted is None or len(body) < _SMALLEST:
        return None, body
    names = {part.partition(b";")[0].strip().lower() for part in accepted.split(b",") if b"q=0" not in part}
    encoding = next((name for name in (b"gzip", b"deflate") if name in names), None)
    if encoding is None:
        return None, body
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOWS[encoding])
    return encoding, stream.compress(body) + stream.flush()
