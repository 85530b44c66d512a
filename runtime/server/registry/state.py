"""State of a server: a directory that one server uses at a time; keys may be created beside it."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tpeft_deploy.errors import InsufficientStorage, ServerError
from tpeft_deploy.runtime.server.registry.audit import Audit
from tpeft_deploy.runtime.server.registry.database import TASKS, Database, sqlite_url
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.registry.files.disk import Reserve, make_private, private
from tpeft_deploy.runtime.server.registry.files.disk_cache import DiskCache
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore
from tpeft_deploy.runtime.server.registry.files.opened_files import OpenedFiles
from tpeft_deploy.runtime.server.registry.files.store import AdapterStore
from tpeft_deploy.runtime.server.registry.files.store_identity import bind_directory, bind_store
from tpeft_deploy.runtime.server.registry.files.stored_objects import open_objects
from tpeft_deploy.runtime.server.registry.files.uploads import clean
from tpeft_deploy.runtime.server.registry.keys import Keys
from tpeft_deploy.runtime.server.registry.leases import Leases
from tpeft_deploy.runtime.server.registry.placements import Placements
from tpeft_deploy.runtime.server.registry.task_store import Tasks
from tpeft_deploy.runtime.server.registry.tenants import Tenants
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["POLL_SECONDS", "State", "open_keys", "open_state"]

_CACHE_BYTES, _STORE_TIMEOUT = 10 * 2**30, 10.0
_log = logging.getLogger("tpeft_deploy.server")
POLL_SECONDS = 0.5
"""Time between two polls for changes of other processes."""
_SELDOM = 20  # polls between two attempts to write pending revocations and to reserve disk space
_NAMES = ("lock", "identity", "reserve", "state.db", "state.db-wal", "state.db-shm", "blobs", "cache", "incoming")
_PATIENCE = 10.0  # seconds for which a killed server may still hold its lock


class State:
    """Keys, tenants, tasks and the audit log.

    Args:
        directory: directory of the files, locked for this process.
        url: URL of the database; by default SQLite in the directory.
        default: quota of tenants without one; by default without limits.
        store: URL of an object store for the adapters; by default they are in the directory.
        cache_bytes: bytes of the disk cache of the object store.
        store_timeout: seconds that a call of the object store may take.

    Attributes:
        shared: whether other servers may use the database and the object store too, each with a directory for the rest:
            with PostgreSQL and an object store.
        leases: leases of the tenants' rates, if the database is shared.
        on_change: called by the thread that watches, after tasks or placements have changed.

    Raises:
        ServerError: another server uses the directory or the database, the database cannot be opened, or it does not
            belong to the directory.
        VersionError: the database was written by a newer version of the server.
    """

    def __init__(
        self,
        directory: Path,
        url: str | None = None,
        *,
        default: Quota | None = None,
        store: str | None = None,
        cache_bytes: int = _CACHE_BYTES,
        store_timeout: float = _STORE_TIMEOUT,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        with ExitStack() as stack:
            stack.enter_context(_locked(directory))
            self._reserve = reserve = Reserve(directory)
            self._database = database = _open_database(directory, url, reserve)
            stack.callback(database.close)
            self.shared = shared = store is not None and not database.local
            database.hold(_PATIENCE, shared=shared)
            self.leases = Leases(database) if shared else None
            self.tenants = Tenants(database, default or Quota())
            self.keys = Keys(database, self.tenants, reserve)
            self.audit = Audit(database)
            self._changes = self._tasks_changes = -1
            incoming, folder = directory / "incoming", directory / ("blobs" if store is None else "cache")
            blobs: AdapterStore
            if store is None:
                blobs = Blobs(folder)
                bind_directory(directory, database, blobs)
            else:
                blobs = ObjectStore(open_objects(store, store_timeout), DiskCache(folder, cache_bytes))
                bind_store(directory / "store-identity", database, blobs)
            clean(incoming)
            self.placements = Placements(database)
            self.tasks = Tasks(database, blobs, incoming, self.tenants.quota, self.placements, shared=shared)
            self.refresh()
            make_private(directory, *_NAMES)
            reserve.keep()
            self._files = OpenedFiles([directory, directory / "lock", *database.files, folder, incoming])
            database.guard = self._files.check
            self._held = stack.pop_all()
        self._listener = self._database.listener() if shared else None
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
        """Take over what other processes have changed."""
        with self._database.reading() as connection:
            changes, tasks = self._database.changes(connection), self._database.changes(connection, TASKS)
            known = None
            if changes != self._changes:
                known = self.tenants.read(connection), self.keys.read(connection)
        if known is not None:
            self.tenants.update_cache(changes, known[0])
            self.keys.update_cache(changes, known[1])
            self._changes = changes
        if tasks != self._tasks_changes:
            self.tasks.refresh()
            self.placements.refresh()
            self._tasks_changes = tasks
            self.on_change()

    @property
    def intact(self) -> bool:
        """Whether the opened files were still there at the last check."""
        return self._files.intact

    def close(self) -> None:
        """Close the database and unlock the directory; idempotent."""
        open_until_now = not self._stop.is_set()
        self._stop.set()
        self._watcher.join()
        if self._listener is not None:
            self._listener.close()
        if self.leases is not None and open_until_now:
            with suppress(ServerError):  # it ends by itself
                self.leases.leave()
        self._held.close()

    def _listened(self) -> bool:
        """Wait for a change of another server; false where changes have to be polled for."""
        return self._listener is not None and self._listener.wait(POLL_SECONDS)

    def _watch(self) -> None:
        for look in itertools.count(1):
            if self._stop.is_set() or (not self._listened() and self._stop.wait(POLL_SECONDS)):
                return
            try:
                self._files.look()
                self._database.hold(0, shared=self.shared)
                self.refresh()
                if look % _SELDOM == 0 and self.intact:
                    self.keys.write_refused()
                    self._reserve.keep()
            except Exception as error:
                # Known keys stay valid; revocations take effect once the database answers again.
                _log.error("cannot look for changed keys: %s", error, exc_info=not isinstance(error, ServerError))


open_state = State
"""Open a state; see `State`."""


def open_keys(directory: Path, url: str | None = None) -> tuple[Keys, Database]:
    """Open the keys alone, beside a server that may be running.

    Args:
        directory: directory of the state.
        url: URL of the database; by default SQLite in the directory.

    Returns:
        The keys, and the database, which the caller closes.

    Raises:
        ServerError: the database cannot be opened, or needs a migration while a server uses it.
        VersionError: the database was written by a newer version of the server.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    reserve = Reserve(directory)
    database = _open_database(directory, url, reserve, exclusive=lambda: _locked(directory))
    keys = Keys(database, Tenants(database, Quota()), reserve)
    try:
        with database.reading() as connection:
            keys.update_cache(database.changes(connection), keys.read(connection))
    except BaseException:
        database.close()
        raise
    return keys, database


def _open_database(
    directory: Path,
    url: str | None,
    reserve: Reserve,
    exclusive: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Database:
    """Open the database; on a full disk, in the space reserved for revocations."""
    file = directory / "state.db"
    if url is None:
        os.close(private(str(file), os.O_RDWR | os.O_CREAT))  # SQLite would apply the umask
    try:
        return Database(url or sqlite_url(file), exclusive=exclusive)
    except InsufficientStorage:
        if not reserve.release():
            raise
        return Database(url or sqlite_url(file), exclusive=exclusive)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory by two handles: of a file in it, and of the directory, because the file may be removed.

    Raises:
        ServerError: another server uses the directory.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    doing = f"open the state in {directory}"
    with ExitStack() as stack:
        try:
            file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            _lock_directory(folder)
        except BlockingIOError as error:
            raise ServerError(
                doing,
                expected="a directory that no other server uses",
                got="one in use",
                fix="Stop that server, or give this one another --state.",
            ) from error
        except OSError as error:
            raise ServerError(doing, problem=error.strerror or str(error)) from error
        yield


def _lock_directory(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems lock only files
        _log.warning("cannot lock the state's directory, only a file in it: %s", error.strerror)
