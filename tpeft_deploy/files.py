"""Atomic, durable writes of files and directories, and digests of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "digest_file",
    "move_into",
    "new_directory",
    "new_file",
    "remove_directory",
    "replace_text",
    "staging",
    "sync_directory",
]


def digest_file(path: Path) -> str:
    """Compute the SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, mode: int | None = None) -> None:
    """Replace a text file atomically and durably; permissions as for `new_file`."""
    with new_file(path, mode) as temporary:
        temporary.write_text(text)


@contextmanager
def new_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it is renamed to `path` on success, removed on failure.

    Args:
        path: final path.
        mode: permissions; default 0o666 less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask() if mode is None else mode)
        _sync_file(temporary)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Remove a directory atomically: an interrupted removal leaves the whole directory or none."""
    trash = path.with_name(f".{path.name}.removed.{os.getpid()}")
    path.rename(trash)
    sync_directory(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory inside `directory`; it is removed at the end, with its content."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".staging."))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into(directory: Path, files: Iterable[Path]) -> None:
    """Flush files to disk and rename them, in order, into a directory of the same file system."""
    for file in files:
        file.chmod(0o666 & ~_umask())
        _sync_file(file)
        file.replace(directory / file.name)
    sync_directory(directory)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path` to fill; it is renamed to `path` on success, removed on failure.

    `path` must not exist, or be an empty directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync_file(file)
            else:
                sync_directory(file)
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    # mkstemp and mkdtemp create files that only the user may read; a bundle gets the user's usual permissions.
    current = os.umask(0)
    os.umask(current)
    return current
