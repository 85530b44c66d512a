"""A server's state: one directory, one server at a time; keys may be made beside it."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tpeft_deploy.errors import ServerError
from tpeft_deploy.files import replace_text
from tpeft_deploy.runtime.server.quotas import Quota
from tpeft_deploy.runtime.server.registry import rows
from tpeft_deploy.runtime.server.registry.audit import Audit
from tpeft_deploy.runtime.server.registry.blobs import Blobs
from tpeft_deploy.runtime.server.registry.database import Database, sqlite_url
from tpeft_deploy.runtime.server.registry.keys import Keys
from tpeft_deploy.runtime.server.registry.staged import clean
from tpeft_deploy.runtime.server.registry.tasks import Tasks
from tpeft_deploy.runtime.server.registry.tenants import Tenants

__all__ = ["State", "open_keys", "open_state"]

_log = logging.getLogger("tpeft_deploy.server")
_SECONDS = 0.5  # between two looks at what other processes changed
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
            stack.callback(os.close, _take(directory))
            self._database = database = Database(url or sqlite_url(directory / "state.db"))
            stack.callback(database.close)
            database.hold(_PATIENCE)
            self.tenants = Tenants(database, default or Quota())
            self.keys = Keys(database, self.tenants)
            self.audit = Audit(database)
            self._changes = -1
            self.refresh()
            incoming, blobs = directory / "incoming", Blobs(directory / "blobs")
            _bind(directory, database, blobs)
            clean(incoming)
            self.tasks = Tasks(database, blobs, incoming, self.tenants.quota)
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

    def close(self) -> None:
        """Let another server have the directory; a second time does nothing."""
        self._stop.set()
        self._watcher.join()
        self._held.close()

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS):
            try:
                self._database.hold(0)
                self.refresh()
            except Exception:
                # Keys that were known stay known; a revocation is seen as soon as the database answers again.
                _log.exception("cannot look for changed keys")


def open_state(directory: Path, url: str | None = None, *, default: Quota | None = None) -> State:
    """See `State`."""
    return State(directory, url, default=default)


def open_keys(directory: Path, url: str | None = None) -> tuple[Keys, Database]:
    """Keys alone, beside a server that may be running; close the database when done."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(url or sqlite_url(directory / "state.db"))
    keys = Keys(database, Tenants(database, Quota()))
    try:
        with database.reading() as connection:
            keys.see(database.changes(connection), keys.read(connection))
    except BaseException:
        database.close()
        raise
    return keys, database


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
        if blobs.any() or rows.any_version(connection):
            raise ServerError(
                f"open the state in {directory}",
                expected="the database that its adapters are registered in",
                got="another one" if known is not None else "an empty one",
                fix="Give the state and the database_url that were used together before.",
            )
        own = secrets.randbelow(2**31)
        replace_text(file, str(own))
        database.bind(connection, own)


def _take(directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ServerError(
            f"open the state in {directory}",
            expected="a directory that no other server uses",
            got="one in use",
            fix="Stop that server, or give this one another --state.",
        ) from error
    return handle
