"""Adapters as files named by the SHA-256 of their content."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Set
from pathlib import Path

from tpeft_deploy.errors import IntegrityError
from tpeft_deploy.files import new_file, sync_directory

__all__ = ["Blobs"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A store of immutable files; nothing in it is named by anybody but their content.

    Args:
        directory: its own.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, data: bytes) -> str:
        """Keep bytes durably, and return their digest."""
        digest = hashlib.sha256(data).hexdigest()
        place = self._place(digest)
        if not self._intact(place, digest):
            place.parent.mkdir(exist_ok=True)
            with new_file(place) as temporary:
                temporary.write_bytes(data)
            sync_directory(self._directory)
        return digest

    def read(self, digest: str, *, of: str) -> bytes:
        """The bytes of a digest.

        Args:
            digest: of them.
            of: what they are, for messages.

        Raises:
            IntegrityError: they are not there, or were altered.
        """
        place = self._place(digest)
        try:
            # Not through a link: the store holds files that it wrote itself.
            data = place.read_bytes() if not place.is_symlink() else None
        except OSError:
            data = None
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(
                f"read {of}",
                expected=f"its file, with digest {digest[:12]}...",
                got="none" if data is None else "altered bytes",
                fix="Register it again; the store was changed by somebody else.",
            )
        return data

    def sweep(self, kept: Set[str], *, older_than: float = 0.0) -> int:
        """Remove files that nothing refers to, if they are older than so many seconds; how many there were."""
        gone = 0
        before = time.time() - older_than
        for place in self._files():
            if place.stem in kept and _DIGEST.fullmatch(place.stem):
                continue
            if older_than == 0.0 or place.lstat().st_mtime <= before:
                place.unlink(missing_ok=True)
                gone += 1
        return gone

    def _files(self) -> Iterator[Path]:
        for folder in self._directory.iterdir():
            if folder.is_dir() and not folder.is_symlink():
                yield from folder.iterdir()

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a SHA-256: {digest!r}")
        return self._directory / digest[:2] / f"{digest}.safetensors"

    def _intact(self, place: Path, digest: str) -> bool:
        if place.is_symlink() or not place.is_file():
            return False
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest
