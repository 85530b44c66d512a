"""Disk of a state: detection of a full disk, space reserved for revocations, and file permissions."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpeft_deploy.errors import InsufficientStorage

__all__ = ["Reserve", "full", "make_private", "no_room", "private", "storing"]

_log = logging.getLogger("tpeft_deploy.server")
_FULL = {errno.ENOSPC, errno.EDQUOT}
# SQLite has separate codes for an exhausted quota and for no space for its log's index.
_FULL_SQLITE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
_FULL_POSTGRES = "53100"
_RESERVE_BYTES = 2**20  # hundreds of revocations in SQLite's log


def full(error: BaseException | None) -> bool:
    """Whether an error of the system or of a database driver means a full disk."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) in _FULL_SQLITE
    return getattr(error, "sqlstate", None) == _FULL_POSTGRES


@contextmanager
def storing(doing: str) -> Iterator[None]:
    """Translate errors of a full disk.

    Raises:
        InsufficientStorage: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not full(error):
            raise
        raise no_room(doing, error) from error


def no_room(doing: str, error: BaseException) -> InsufficientStorage:
    """Return the error of a full disk, and log the system's message."""
    _log.error("%s: the disk is full: %s", doing, error)
    return InsufficientStorage(doing, problem="the server's disk is full", fix="The operator has to make room.")


class Reserve:
    """Disk space that is released when a revocation meets a full disk.

    Args:
        directory: directory on that disk.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "reserve"

    def keep(self) -> None:
        """Reserve the space, unless it is reserved or the disk is nearly full."""
        try:
            if self._file.is_file() and self._file.stat().st_size == _RESERVE_BYTES:
                return
            about = os.statvfs(self._file.parent)
            if about.f_bavail * about.f_frsize < 4 * _RESERVE_BYTES:
                return
            with open(self._file, "wb", opener=private) as file:
                file.write(os.urandom(_RESERVE_BYTES))  # zeros may be stored sparsely
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            _log.warning("cannot keep room for revocations on the disk: %s", error)

    def release(self) -> bool:
        """Release the space; return whether any was reserved."""
        try:
            had = self._file.stat().st_size > 0
            os.truncate(self._file, 0)
        except OSError:
            return False
        return had


def private(path: str, flags: int) -> int:
    """Open a file that only the server's user may read, whatever the umask; an `opener` for `open`."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def make_private(directory: Path, *names: str) -> None:
    """Restrict a directory, and some entries of it with their content, to the server's user.

    Links are skipped; entries of another user are logged.
    """
    _restrict(directory)
    for name in names:
        place = directory / name
        if _restrict(place):
            make_private(place, *os.listdir(place))


def _restrict(place: Path) -> bool:
    """Restrict a file or directory to the server's user; return whether it is a directory."""
    try:
        mode = place.lstat().st_mode
        if stat.S_ISLNK(mode):
            return False
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
        if stat.S_IMODE(mode) != wanted:
            place.chmod(wanted)
    except FileNotFoundError:
        return False
    except OSError as error:
        _log.warning("cannot keep others from %s: %s", place, error)
    return stat.S_ISDIR(mode)
