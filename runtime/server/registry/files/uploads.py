"""Staging of uploads: files in a temporary directory, under fixed names."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.isolation.reader import CONFIG_FILE, WEIGHTS_FILE
from tpeft_deploy.runtime.server.registry.files.disk import private, storing

__all__ = ["CONFIG", "RunBlocking", "Staged", "WEIGHTS", "clean", "staging"]

WEIGHTS, CONFIG = "weights", "config"
_NAMES = {WEIGHTS: WEIGHTS_FILE, CONFIG: CONFIG_FILE}
_CONFIG_BYTES = 2**20
RunBlocking = Callable[..., Awaitable[Any]]
"""Function that runs a blocking call in a thread."""


class Staged:
    """An upload: a file of weights, and a configuration for formats that have one.

    Args:
        directory: directory of the upload, used by nothing else.
        limit: maximum bytes of all files together.
        run: function that runs a blocking call in a thread.
    """

    def __init__(self, directory: Path, limit: int, run: RunBlocking = asyncio.to_thread) -> None:
        self.directory = directory
        self._limit = limit
        self._run = run
        self._written = 0

    async def write(self, part: str, stream: AsyncIterator[bytes]) -> None:
        """Write one file.

        Args:
            part: "weights" (safetensors) or "config" (adapter_config.json).
            stream: chunks of the file.

        Raises:
            ProtocolError: the part is unknown, or repeated.
            TooLarge: the upload exceeds its limit; the rest is not read.
        """
        if part not in _NAMES:
            raise ProtocolError("take an upload", expected=f"parts named {' and '.join(_NAMES)}", got=repr(part))
        place = self.directory / _NAMES[part]
        if place.exists():
            raise ProtocolError("take an upload", expected=f"one part {part!r}", got="another one")
        limit = min(self._limit - self._written, _CONFIG_BYTES if part == CONFIG else self._limit)
        with open(place, "xb", opener=private) as file:
            await self._copy(part, stream, file, limit)

    async def _copy(self, part: str, stream: AsyncIterator[bytes], file: BinaryIO, limit: int) -> None:
        own = 0
        async for data in stream:
            own += len(data)
            self._written += len(data)
            if own > limit:
                raise TooLarge(
                    f"take an upload, part {part!r}", expected=f"at most {limit:,} bytes", got=f"{own:,} and more"
                )
            await self._run(file.write, data)


@asynccontextmanager
async def staging(directory: Path, limit: int, run: RunBlocking = asyncio.to_thread) -> AsyncIterator[Staged]:
    """Create a directory for an upload, removed with its content at the end."""
    with storing("take an upload"):
        own = Path(await run(tempfile.mkdtemp, dir=directory, prefix="upload."))
        try:
            yield Staged(own, limit, run)
        finally:
            await asyncio.shield(run(shutil.rmtree, own, ignore_errors=True))


def clean(directory: Path) -> None:
    """Create the directory of uploads, without remains of a killed server."""
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, mode=0o700)
