"""A server's state: one directory, one server at a time; keys may be made beside it."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from tpeft_deploy.errors import InsufficientStorage, ServerError
from tpeft_deploy.files import replace_text
from tpeft_deploy.runtime.server.registry import queries
from tpeft_deploy.runtime.server.registry.audit import Audit
from tpeft_deploy.runtime.server.registry.database import Database, sqlite_url
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.registry.files.disk import Reserve, make_private, private
from tpeft_deploy.runtime.server.registry.files.opened_files import OpenedFiles
from tpeft_deploy.runtime.server.registry.files.uploads import clean
from tpeft_deploy.runtime.server.registry.keys import Keys
from tpeft_deploy.runtime.server.registry.placements import Placements
from tpeft_deploy.runtime.server.registry.task_store import Tasks
from tpeft_deploy.runtime.server.registry.tenants import Tenants
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["State", "open_keys", "open_state"]

_log = logging.getLogger("tpeft_deploy.server")
_SECONDS = 0.5  # between two looks at what other processes changed
_SELDOM = 20  # of these looks, one also writes what could not be written, and keeps room on the disk
_NAMES = ("lock", "identity", "reserve", "state.db", "state.db-wal", "state.db-shm", "blobs", "incoming")
_PATIENCE = 10.0  # seconds for which a server that was killed may still seem to be there


class State:
    """Keys, tenants, tasks and the audit log.

    Args:
        directory: where files are, taken for this process alone.
        url: of the database; SQLite in the directory by default.
        default: the quota of tenants that have none of their own.

    Raises:
        ServerError: another server has the directory or the database, which cannot be opened, or is not that of the
            directory.
        VersionError: the database was written by another version of the server.
    """

    def __init__(self, directory: Path, url: str | None = None, *, default: Quota | None = None) -> None:
        with ExitStack() as stack:
            stack.enter_context(_taken(directory))
            self._reserve = reserve = Reserve(directory)
            self._database = database = _opened(directory, url, reserve)
            stack.callback(database.close)
            database.hold(_PATIENCE)
            self.tenants = Tenants(database, default or Quota())
            self.keys = Keys(database, self.tenants, reserve)
            self.audit = Audit(database)
            self._changes = -1
            self.refresh()
            incoming, blobs = directory / "incoming", Blobs(directory / "blobs")
            _bind(directory, database, blobs)
            clean(incoming)
            self.tasks = Tasks(database, blobs, incoming, self.tenants.quota)
            self.placements = Placements(database)
            make_private(directory, *_NAMES)
            reserve.keep()
            self._files = OpenedFiles([directory, directory / "lock", *database.files, directory / "blobs", incoming])
            database.guard = self._files.check
            self._held = stack.pop_all()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="tpeft-keys", daemon=True)
        self._watcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def refresh(self) -> None:
        """See what other processes changed of keys and tenants."""
        with self._database.reading() as connection:
            changes = self._database.changes(connection)
            if changes == self._changes:
                return
            tenants, keys = self.tenants.read(connection), self.keys.read(connection)
        self.tenants.see(changes, tenants)
        self.keys.see(changes, keys)
        self._changes = changes

    @property
    def intact(self) -> bool:
        """Whether the files that it opened are still there, as far as that was noticed."""
        return self._files.intact

    def close(self) -> None:
        """Let another server have the directory; a second time does nothing."""
        self._stop.set()
        self._watcher.join()
        self._held.close()

    def _watch(self) -> None:
        for look in itertools.count(1):
            if self._stop.wait(_SECONDS):
                return
            try:
                self._files.look()
                self._database.hold(0)
                self.refresh()
                if look % _SELDOM == 0 and self.intact:
                    self.keys.write_refused()
                    self._reserve.keep()
            except Exception as error:
                # Keys that were known stay known; a revocation is seen as soon as the database answers again.
                _log.error("cannot look for changed keys: %s", error, exc_info=not isinstance(error, ServerError))


def open_state(directory: Path, url: str | None = None, *, default: Quota | None = None) -> State:
    """See `State`."""
    return State(directory, url, default=default)


def open_keys(directory: Path, url: str | None = None) -> tuple[Keys, Database]:
    """Keys alone, beside a server that may be running; close the database when done."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    reserve = Reserve(directory)
    database = _opened(directory, url, reserve, exclusive=lambda: _taken(directory))
    keys = Keys(database, Tenants(database, Quota()), reserve)
    try:
        with database.reading() as connection:
            keys.see(database.changes(connection), keys.read(connection))
    except BaseException:
        database.close()
        raise
    return keys, database


def _opened(
    directory: Path,
    url: str | None,
    reserve: Reserve,
    exclusive: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Database:
    """The database; on a full disk with the room that was kept for revocations, which only it can write."""
    file = directory / "state.db"
    if url is None:
        os.close(private(str(file), os.O_RDWR | os.O_CREAT))  # SQLite would leave the permissions to the umask
    try:
        return Database(url or sqlite_url(file), exclusive=exclusive)
    except InsufficientStorage:
        if not reserve.release():
            raise
        return Database(url or sqlite_url(file), exclusive=exclusive)


def _bind(directory: Path, database: Database, blobs: Blobs) -> None:
    """Refuse a directory and a database that are not each other's.

    What no row of the database refers to is removed from the directory: with the wrong one that would be everything.

    Raises:
        ServerError: one of them has adapters, and they do not name each other.
    """
    file = directory / "identity"
    own = int(file.read_text()) if file.exists() else None
    with database.writing() as connection:
        known = database.directory(connection)
        if own is not None and own == known:
            return
        if blobs.any() or queries.any_version(connection):
            raise ServerError(
                f"open the state in {directory}",
                expected="the database that its adapters are registered in",
                got="another one" if known is not None else "an empty one",
                fix="Give the state and the database_url that were used together before.",
            )
        own = secrets.randbelow(2**31)
        replace_text(file, str(own), 0o600)
        database.bind(connection, own)


@contextmanager
def _taken(directory: Path) -> Iterator[None]:
    """Lock a directory for this process.

    Raises:
        ServerError: another server has the directory.
    """
    handles = _take(directory)
    try:
        yield
    finally:
        for handle in handles:
            os.close(handle)


def _take(directory: Path) -> list[int]:
    """Handles that lock a directory: of a file in it, and of itself, as the file may be removed."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    handles: list[int] = []
    try:
        handles.append(os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        handles.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        _lock_directory(handles[1])
    except OSError as error:
        for handle in handles:
            os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise ServerError(f"open the state in {directory}", problem=error.strerror or str(error)) from error
        raise ServerError(
            f"open the state in {directory}",
            expected="a directory that no other server uses",
            got="one in use",
            fix="Stop that server, or give this one another --state.",
        ) from error
    return handles


def _lock_directory(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some networks' file systems lock files only
        _log.warning("cannot lock the state's directory, only a file in it: %s", error.strerror)
