"""Request bodies: buffers and files, streamed one after the other without being joined."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tpeft_deploy.client.tensors import Bytes
from tpeft_deploy.errors import FormatError

__all__ = ["RequestBody", "FilePiece"]

_CHUNK = 1 << 18  # large enough to amortise calls, small enough for the cache
_SMALL = 1 << 16


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A whole file.

    Attributes:
        path: path of the file.
        size: bytes, as announced to the server before the file is read.
    """

    path: Path
    size: int


class RequestBody:
    """The body of a request; it can be sent repeatedly.

    Args:
        pieces: buffers and files, in order.
    """

    def __init__(self, pieces: Sequence[Bytes | FilePiece]) -> None:
        self._pieces = pieces
        self.size = sum(piece.size if isinstance(piece, FilePiece) else len(piece) for piece in pieces)

    def blocking(self) -> bytes | Iterator[bytes]:
        """Return content for `httpx.Client`."""
        return self._whole() if self._is_small() else self._chunks()

    def asynchronous(self) -> bytes | AsyncIterator[bytes]:
        """Return content for `httpx.AsyncClient`; files are read in a thread."""
        return self._whole() if self._is_small() else self._async_chunks()

    def _is_small(self) -> bool:
        return self.size <= _SMALL and not any(isinstance(piece, FilePiece) for piece in self._pieces)

    def _whole(self) -> bytes:
        return b"".join(piece for piece in self._pieces if not isinstance(piece, FilePiece))

    def _chunks(self) -> Iterator[bytes]:
        for piece in self._pieces:
            yield from _read(piece) if isinstance(piece, FilePiece) else _cut(piece)

    async def _async_chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if not isinstance(piece, FilePiece):
                for chunk in _cut(piece):
                    yield chunk
                continue
            chunks = _read(piece)
            try:
                while chunk := await asyncio.to_thread(next, chunks, b""):
                    yield chunk
            finally:
                chunks.close()


def _cut(piece: Bytes) -> Iterator[bytes]:
    view = memoryview(piece)
    for start in range(0, len(view), _CHUNK):
        yield bytes(view[start : start + _CHUNK])


def _read(piece: FilePiece) -> Generator[bytes, None, None]:
    left = piece.size
    with piece.path.open("rb") as file:
        while left:
            chunk = _some(file, piece, left)
            left -= len(chunk)
            yield chunk


def _some(file: BinaryIO, piece: FilePiece, left: int) -> bytes:
    chunk = file.read(min(_CHUNK, left))
    if not chunk:
        raise FormatError(
            f"send {piece.path}",
            expected=f"{piece.size} bytes, as when it was opened",
            got=f"{piece.size - left} bytes: it became shorter meanwhile",
        )
    return chunk
