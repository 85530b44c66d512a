"""Content-addressed store: adapters as files named by their SHA-256."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from tpeft_deploy.errors import IntegrityError
from tpeft_deploy.files import new_file, sync_directory
from tpeft_deploy.runtime.server.registry.files.disk import storing
from tpeft_deploy.runtime.server.registry.files.store import PendingDigests, Referred

__all__ = ["Blobs"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """Store of immutable files, named by digest.

    Args:
        directory: directory of the store, used by nothing else.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # guards sweeps, and the digests that a sweep must keep
        self._pending = PendingDigests(self._lock)
        self._released: dict[str, float] = {}  # digest -> monotonic time when a reference was dropped
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @staticmethod
    def digest(data: bytes) -> str:
        """Return the digest of bytes."""
        return hashlib.sha256(data).hexdigest()

    def write(self, data: bytes) -> str:
        """Store bytes durably and return their digest; an altered file is replaced.

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
        """Read the bytes of a digest.

        Args:
            digest: digest of the bytes.
            of: description of the content, for error messages.

        Raises:
            IntegrityError: the file is missing or was altered.
        """
        place = self._place(digest)
        try:
            # Links are not followed: the store writes none.
            data = None if _linked(place) else place.read_bytes()
        except OSError:
            data = None
        if data is None or self.digest(data) != digest:
            raise IntegrityError(
                f"read {of}",
                expected=f"its file, with digest {digest[:12]}...",
                got="none" if data is None else "altered bytes",
                fix="Register it again; another program changed the store.",
            )
        return data

    def any(self) -> bool:
        """Whether the store has any files."""
        return next(self._files(), None) is not None

    @contextmanager
    def pending(self, data: bytes) -> Iterator[str]:
        """Store bytes that no sweep removes before the block ends; by then they are referenced, or not needed.

        Returns:
            The digest.
        """
        digest = self.digest(data)
        with self._pending.hold(digest):
            self.write(data)
            yield digest

    def release(self, digests: Iterable[str]) -> None:
        """Record dropped references; a sweep keeps the files for its grace period."""
        now = time.monotonic()
        with self._lock:
            self._released |= dict.fromkeys(digests, now)

    def discard(self, digest: str, referred: Referred) -> None:
        """Remove the file of a refused upload, unless it is needed otherwise.

        Args:
            digest: digest of the file.
            referred: function that returns a context with the referenced digests.
        """
        with referred() as used, self._lock:
            if digest not in {*used, *self._released, *self._pending}:
                self._place(digest).unlink(missing_ok=True)

    def clean(self, referred: Referred) -> None:
        """Remove what a killed server left, at the start."""
        self.sweep(referred, grace=0)

    def sweep(self, referred: Referred, *, grace: float) -> int:
        """Remove unreferenced files and return their number.

        Args:
            referred: function that returns a context with the referenced digests.
            grace: seconds that a file stays after its last reference was dropped, for in-flight reads.
        """
        with referred() as used, self._lock:
            late = time.monotonic() - grace
            self._released = {digest: at for digest, at in self._released.items() if at > late}
            kept = {*used, *self._released, *self._pending}
            gone = [place for place in self._files() if not self._stays(place, kept)]
            for place in gone:
                place.unlink(missing_ok=True)
            return len(gone)

    def _stays(self, place: Path, kept: Set[str]) -> bool:
        digest = place.stem
        if digest in kept and place.name == f"{digest}.safetensors" and place.parent.name == digest[:2]:
            return True
        return place.name.lstrip(".")[:64] in self._pending  # the temporary file of a pending write

    def _files(self) -> Iterator[Path]:
        for folder in self._directory.iterdir():
            # Links are not followed: their targets are not the store's.
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
