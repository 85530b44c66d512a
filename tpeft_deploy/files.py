"""Writing so that a crash leaves either the old or the new content, and digests of files."""

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
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a small file beside its place and rename it there, durably; with the permissions of `new_file`."""
    with new_file(path, mode) as temporary:
        temporary.write_text(text)


@contextmanager
def new_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` on success, removed on failure.

    Args:
        path: where the file is to be.
        mode: its permissions; those that the umask leaves by default.
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
    """Remove a directory so that it is there whole or not at all, even if the removal is cut short."""
    trash = path.with_name(f".{path.name}.removed.{os.getpid()}")
    path.rename(trash)
    sync_directory(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A private directory inside `directory` to build files in; removed at the end with whatever is left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".staging."))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into(directory: Path, files: Iterable[Path]) -> None:
    """Make files durable and rename them, in order, into a directory of the same file system."""
    for file in files:
        file.chmod(0o666 & ~_umask())
        _sync_file(file)
        file.replace(directory / file.name)
    sync_directory(directory)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to fill; renamed to `path` on success, removed on failure.

    `path` itself must not exist, or be an empty directory.
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
    # mkstemp and mkdtemp create private files; a bundle is shared like any other file the user makes.
    current = os.umask(0)
    os.umask(current)
    return current
