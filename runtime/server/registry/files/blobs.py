"""Adapters as files named by the SHA-256 of their content."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from tpeft_deploy.errors import IntegrityError
from tpeft_deploy.files import new_file, sync_directory
from tpeft_deploy.runtime.server.registry.files.disk import storing

__all__ = ["Blobs"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A store of immutable files; nothing in it is named by anybody but their content.

    Args:
        directory: its own.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # of sweeping, and of saying what a sweep must leave
        self._coming: Counter[str] = Counter()  # digests of what is being written, or has no reference yet
        self._freed: dict[str, float] = {}  # digest -> when (monotonic) a reference to it was dropped
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @staticmethod
    def digest(data: bytes) -> str:
        """What bytes are kept under."""
        return hashlib.sha256(data).hexdigest()

    def write(self, data: bytes) -> str:
        """Keep bytes durably, and return their digest; a file that was altered is mended.

        Raises:
            InsufficientStorage: the disk is full.
        """
        digest = self.digest(data)
        place = self._place(digest)
        if not self._intact(place, digest):
            if place.parent.is_symlink():
                place.parent.unlink()
            with storing("store an adapter"):
                place.parent.mkdir(exist_ok=True, mode=0o700)
                with new_file(place, 0o600) as temporary:
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
            data = None if _linked(place) else place.read_bytes()
        except OSError:
            data = None
        if data is None or self.digest(data) != digest:
            raise IntegrityError(
                f"read {of}",
                expected=f"its file, with digest {digest[:12]}...",
                got="none" if data is None else "altered bytes",
                fix="Register it again; the store was changed by somebody else.",
            )
        return data

    def any(self) -> bool:
        """Whether there are files."""
        return next(self._files(), None) is not None

    @contextmanager
    def coming(self, data: bytes) -> Iterator[str]:
        """Keep bytes, which no sweep removes before the block ends: by then something refers to them, or nothing will.

        Returns:
            Their digest.
        """
        digest = self.digest(data)
        with self._lock:
            self._coming[digest] += 1
        try:
            self.write(data)
            yield digest
        finally:
            with self._lock:
                self._coming[digest] -= 1
                self._coming = +self._coming

    def free(self, digests: Iterable[str]) -> None:
        """Note that something which referred to these does so no longer; a sweep leaves them for its grace."""
        now = time.monotonic()
        with self._lock:
            self._freed |= dict.fromkeys(digests, now)

    def discard(self, digest: str, referred: Set[str]) -> None:
        """Remove the file of something that was refused, unless another needs it.

        Args:
            digest: of it.
            referred: digests of what stays.
        """
        with self._lock:
            if digest not in {*referred, *self._freed, *self._coming}:
                self._place(digest).unlink(missing_ok=True)

    def sweep(self, referred: Set[str], *, grace: float) -> int:
        """Remove what nothing refers to; how many files there were.

        Args:
            referred: digests of what stays.
            grace: seconds for which what was freed stays too, as somebody may be about to read it.
        """
        with self._lock:
            late = time.monotonic() - grace
            self._freed = {digest: at for digest, at in self._freed.items() if at > late}
            kept = {*referred, *self._freed, *self._coming}
            gone = [place for place in self._files() if not self._stays(place, kept)]
            for place in gone:
                place.unlink(missing_ok=True)
            return len(gone)

    def _stays(self, place: Path, kept: Set[str]) -> bool:
        digest = place.stem
        if digest in kept and place.name == f"{digest}.safetensors" and place.parent.name == digest[:2]:
            return True
        return place.name.lstrip(".")[:64] in self._coming  # the file beside it that is to become it

    def _files(self) -> Iterator[Path]:
        for folder in self._directory.iterdir():
            # Not through a link: what is behind it is somebody else's.
            if folder.is_dir() and not folder.is_symlink():
                yield from folder.iterdir()
            else:
                yield folder

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a SHA-256: {digest!r}")
        return self._directory / digest[:2] / f"{digest}.safetensors"

    def _intact(self, place: Path, digest: str) -> bool:
        if _linked(place) or not place.is_file():
            return False
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest


def _linked(place: Path) -> bool:
    return place.is_symlink() or place.parent.is_symlink()
