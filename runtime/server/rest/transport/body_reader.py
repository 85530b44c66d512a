"""Rest of a large body, received straight into the buffer that its tensors are views of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

__all__ = ["BodyReader"]

_ALIGNMENT = 64


class BodyReader(asyncio.BufferedProtocol):
    """Protocol of a connection until a body of a declared length has arrived.

    uvicorn copies a body four times, a piece of 256 KiB at a time: out of the event loop's buffer, out of the parser's,
    behind the previous pieces, and into a message.  Here the socket writes where the tensors are read.

    Args:
        connection: protocol of the connection, told of all that is no piece of the body.
        first: first bytes of the body.
        size: size of the body in bytes, larger than that of `first`.
        tensors: bytes before the first tensor, which is aligned in memory, as a model's inputs have to be.
        advance: called with the number of bytes of each piece.
    """

    def __init__(
        self, connection: asyncio.Protocol, first: bytes, size: int, tensors: int, advance: Callable[[int], None]
    ) -> None:
        self._connection = connection
        self._advance = advance
        room = np.empty(size + _ALIGNMENT, np.uint8)  # unlike a bytearray, takes memory as it is filled
        start = -(room.ctypes.data + tensors) % _ALIGNMENT
        self._buffer = room[start : start + size].data
        self._filled = len(first)
        self._buffer[: len(first)] = first

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have arrived."""
        return self._filled == len(self._buffer)

    @property
    def body(self) -> memoryview:
        """The bytes that have arrived."""
        return self._buffer[: self._filled]

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go; what follows the body stays in the socket."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Count a piece."""
        self._filled += nbytes
        self._advance(nbytes)

    def eof_received(self) -> bool | None:
        """Forward the end of the client's data."""
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forward the loss of the connection."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """Forward a full write buffer."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """Forward an empty write buffer."""
        self._connection.resume_writing()
