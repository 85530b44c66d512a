"""Database of the registry: durable transactions, one writer at a time."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    delete,
    event,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tpeft_deploy.errors import InsufficientStorage, MissingExtra, ServerError, Unavailable
from tpeft_deploy.runtime.server.registry import migrations, schema
from tpeft_deploy.runtime.server.registry.files.disk import full, no_room
from tpeft_deploy.runtime.server.registry.listener import CHANNEL, Listener

__all__ = ["KEYS", "TASKS", "Database", "sqlite_url"]

_log = logging.getLogger("tpeft_deploy.server")

KEYS, TASKS = "changes", "tasks"  # change counters, by their names in `meta`
_WRITING, _SERVING = 0x7470_6566, 0x7470_6567  # advisory locks of the one writer and the one server
_LOCK_SECONDS = 30
_STOP_SECONDS = 10  # wait of a migration for a running server to stop
_LOCK_NOT_AVAILABLE = "55P03"


class Database:
    """Database with the tables of `schema`, created or migrated when it is opened.

    Args:
        url: SQLAlchemy URL of a SQLite file (in WAL mode, synchronised at every commit) or of PostgreSQL.
        exclusive: function that returns a context to enter around a migration; the context raises when a server uses
            the database.

    Attributes:
        guard: function called before and after each writing transaction; raises when the files are gone.

    Raises:
        MissingExtra: the database driver is not installed.
        ServerError: the database cannot be opened.
        VersionError: the database was written by a newer version of the server.
    """

    def __init__(
        self, url: str | URL, *, exclusive: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        with _errors("open the server's database"):
            self._engine = _engine(make_url(url))
        self._held: Connection | None = None
        self._opened = False
        self.guard: Callable[[], None] = lambda: None
        try:
            with self.writing("open the server's database") as connection:
                migrated = self._open_tables(connection, exclusive)
            if migrated:
                _log.info("the server's database is migrated %s", migrated)
            self._opened = True
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self, doing: str = "write to the server's database") -> Iterator[Connection]:
        """Open a writing transaction, durable when the block ends and rolled back when it raises.

        Args:
            doing: purpose of the transaction, for error messages.

        Raises:
            ServerError: the database reports an error.
            Unavailable: the database does not answer, or its files are gone.
            InsufficientStorage: the disk is full.
        """
        self.guard()
        with (
            self._errors(doing),
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection
        self.guard()  # else changes to removed files would be acknowledged

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a reading transaction: a consistent snapshot, without waiting for writers.

        Raises:
            ServerError: the database reports an error.
            Unavailable: the database does not answer.
        """
        doing = "read the server's database"
        options: dict[str, Any] = {"writes": False}
        if not self._is_sqlite:
            options["isolation_level"] = "REPEATABLE READ"
        with (
            self._errors(doing),
            self._engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            yield connection

    def hold(self, patience: float, *, shared: bool = False) -> None:
        """Lock the database for this server until it is closed, or lock it again after a lost connection.

        SQLite is locked by its directory; PostgreSQL is reachable from several machines.

        Args:
            patience: seconds to wait for another server to stop.
            shared: whether other servers may hold it too, if they share it.

        Raises:
            ServerError: another server uses the database, alone or, unless `shared`, at all.
        """
        if self._is_sqlite or self._has_lock():
            return
        with _errors("open the server's database"):
            self._held = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT", writes=False)
            # Without keep-alives, the database would keep the lock of a lost machine for hours.
            for setting, seconds in (("idle", 3), ("interval", 2), ("count", 3)):
                self._held.execute(text(f"SET tcp_keepalives_{setting} = {seconds}"))
            until = time.monotonic() + patience
            kind = "_shared" if shared else ""
            mine = text(f"SELECT pg_try_advisory_lock{kind}(:lock, hashtext(current_schema()))")
            while not self._held.scalar(mine, {"lock": _SERVING}):
                if time.monotonic() > until:
                    self._unlock()
                    raise ServerError(
                        "open the server's database",
                        expected=f"one that no other server uses{' alone' if shared else ''}",
                        got="one in use",
                        fix="Stop that server, or give this one another database_url.",
                    )
                time.sleep(0.2)

    def changed(self, connection: Connection, what: str = KEYS) -> int:
        """Increment a change counter, and tell the processes that listen, as part of a transaction.

        One transaction writes at a time, so that the numbers are in the order in which changes become visible.

        Args:
            connection: connection with a writing transaction.
            what: `KEYS` for keys and tenants, `TASKS` for tasks and placements.

        Returns:
            The counter.
        """
        own = update(schema.meta).where(schema.meta.c.name == what).values(value=schema.meta.c.value + 1)
        connection.execute(own)
        if not self._is_sqlite:
            connection.execute(text(f"SELECT pg_notify({CHANNEL}, '')"))
        return self.changes(connection, what)

    def changes(self, connection: Connection, what: str = KEYS) -> int:
        """Return a change counter; see `changed`."""
        return self._meta(connection, what) or 0

    def listener(self) -> Listener | None:
        """Return what waits for changes of other servers; None where they have to be polled for."""
        return None if self._is_sqlite else Listener(self._engine)

    def directory(self, connection: Connection) -> int | None:
        """Return the number of the directory with the adapters of this database; None before the first start."""
        return self._meta(connection, "directory")

    def bind(self, connection: Connection, directory: int) -> None:
        """Set the number of the directory with the adapters, as part of a transaction."""
        connection.execute(delete(schema.meta).where(schema.meta.c.name == "directory"))
        connection.execute(insert(schema.meta).values(name="directory", value=directory))

    def close(self) -> None:
        """Close all connections."""
        self._unlock()
        self._engine.dispose()

    def _open_tables(self, connection: Connection, exclusive: Callable[[], AbstractContextManager[object]]) -> str:
        """Create or migrate the tables; return what was migrated, for the log."""
        number = migrations.stored_schema(connection)
        if number is None:
            migrations.create(connection)
            return ""
        if number == schema.SCHEMA:
            return ""
        with exclusive():
            if not self._is_sqlite:
                self._wait_for_server(connection)
            copy = migrations.copy_sqlite(self.files[0]) if self.files else None
            migrations.upgrade(connection, number)
        return f"from schema {number} to {schema.SCHEMA}" + (f"; {copy} is the database before" if copy else "")

    def _wait_for_server(self, connection: Connection) -> None:
        """Take the servers' lock until the transaction ends: no server may run on tables that are migrated."""
        try:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_STOP_SECONDS}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SERVING}, hashtext(current_schema()))")
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            raise ServerError(
                "migrate the server's database",
                expected="one that no server uses",
                got="one in use",
                fix="Stop the server of the earlier version first.",
            ) from error

    def _has_lock(self) -> bool:
        if self._held is None:
            return False
        try:
            self._held.execute(text("SELECT 1"))
        except SQLAlchemyError:
            self._unlock()
            return False
        return True

    def _unlock(self) -> None:
        if self._held is not None:
            self._held.invalidate()  # not returned to the pool: the lock belongs to the connection
            self._held.close()
            self._held = None

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            with _errors(doing):
                yield
        except ServerError as error:
            if isinstance(error, InsufficientStorage) or not self._opened:
                raise
            if not isinstance(error.__cause__, OperationalError | PoolTimeout):
                raise
            _log.error("%s", error)  # the message has addresses, which clients must not see
            raise Unavailable(doing, problem="it does not answer", fix="Try again shortly.") from error.__cause__

    @property
    def local(self) -> bool:
        """Whether the database is a file, which only servers of one machine could use."""
        return self._is_sqlite

    @property
    def files(self) -> list[Path]:
        """Paths of SQLite's files: the database, its log and the log's index."""
        name = self._engine.url.database
        if not self._is_sqlite or not name or name == ":memory:":
            return []
        return [Path(f"{name}{suffix}") for suffix in ("", "-wal", "-shm")]

    @property
    def _is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def _meta(self, connection: Connection, name: str) -> int | None:
        return connection.scalar(select(schema.meta.c.value).where(schema.meta.c.name == name))


def sqlite_url(path: Path) -> URL:
    """Return the URL of a SQLite file; its path may have any characters."""
    return URL.create("sqlite", database=str(path.resolve()))


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        own = getattr(error, "orig", None) or error
        if full(own):
            raise no_room(doing, own) from error
        raise ServerError(doing, problem=_reason(error)) from error


def _engine(url: URL) -> Engine:
    """Create an engine that runs one writing transaction at a time."""
    kind = url.get_backend_name()
    if kind not in {"sqlite", "postgresql"}:
        raise ServerError("open the server's database", expected="a URL of sqlite or postgresql", got=kind)
    if kind == "postgresql" and "+" not in url.drivername:
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(url, pool_pre_ping=kind != "sqlite")
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "open the server's database",
            expected="a driver for it",
            got=str(error),
            fix="pip install 'tpeft-deploy[postgres]', and write the URL as postgresql+psycopg://...",
        ) from error
    if kind == "sqlite":
        _prepare_sqlite(engine)
    else:
        _prepare_postgres(engine)
    return engine


def _prepare_postgres(engine: Engine) -> None:
    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        # As with SQLite: no other writer between a read and its write, even where no row exists to be locked.
        if connection.get_execution_options().get("writes", True):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITING}, hashtext(current_schema()))")


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions too late to be safe
        connection.execute(f"PRAGMA busy_timeout={_LOCK_SECONDS * 1000}")
        _keep_log(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        # A transaction that begins as a reader fails at its first write when another one wrote meanwhile.
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _keep_log(connection: sqlite3.Connection) -> None:
    """Put a database into WAL mode; SQLite does not wait for others that use a file that is in another mode."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _reason(error: Exception) -> str:
    # The driver's message, without the statement and its values.
    own = getattr(error, "orig", None)
    return str(own or error).splitlines()[0]
