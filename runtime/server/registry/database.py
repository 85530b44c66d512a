"""The tables, and a connection whose transactions are durable and one writer's at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from tpeft_deploy.errors import ServerError, VersionError

__all__ = ["Database", "aliases", "audit", "keys", "sqlite_url", "tasks", "tenants", "versions"]

SCHEMA = 1
_NAME = String(128)

_metadata = MetaData()
_meta = Table("meta", _metadata, Column("name", _NAME, primary_key=True), Column("value", Integer, nullable=False))
tenants = Table(
    "tenants",
    _metadata,
    Column("name", _NAME, primary_key=True),
    Column("quota", JSON, nullable=False),
    Column("created", Float, nullable=False),
)
keys = Table(
    "keys",
    _metadata,
    Column("id", String(16), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("tenant", _NAME, nullable=False),
    Column("role", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)
# A deleted task keeps its row, so that the numbers of its versions are never given again.
tasks = Table(
    "tasks",
    _metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("tenant", _NAME, nullable=False),
    Column("name", _NAME, nullable=False),
    Column("next_number", Integer, nullable=False),
    Column("deleted", Boolean, nullable=False),
    UniqueConstraint("tenant", "name"),
)
versions = Table(
    "versions",
    _metadata,
    Column("task", ForeignKey("tasks.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    Column("by", _NAME, nullable=False),
)
aliases = Table(
    "aliases",
    _metadata,
    Column("task", ForeignKey("tasks.id"), primary_key=True),
    Column("alias", _NAME, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("previous", Integer),
)
audit = Table(
    "audit",
    _metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("tenant", _NAME, nullable=False),
    Column("key", _NAME, nullable=False),
    Column("action", String(32), nullable=False),
    Column("target", String(300), nullable=False),
    Column("detail", JSON, nullable=False),
)


class Database:
    """A database with the tables above, made where they are missing.

    Args:
        url: of SQLAlchemy; of a file for SQLite, which is kept in WAL mode and synchronised at every commit.

    Raises:
        ServerError: it cannot be opened.
        VersionError: it was written by another version of the server.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine = create_engine(url)
            if self._engine.dialect.name == "sqlite":
                _prepare_sqlite(self._engine)
            with self._engine.begin() as connection:
                _metadata.create_all(connection)
                found = connection.scalar(select(_meta.c.value).where(_meta.c.name == "schema"))
                if found is None:
                    connection.execute(
                        insert(_meta), [{"name": "schema", "value": SCHEMA}, {"name": "changes", "value": 0}]
                    )
        except SQLAlchemyError as error:
            raise ServerError("open the server's database", problem=_reason(error)) from error
        if found not in {None, SCHEMA}:
            raise VersionError("open the server's database", expected=f"schema {SCHEMA}", got=found)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction that may write: all of it is durable when the block ends, or nothing of it is done."""
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that sees one moment."""
        with self._engine.connect().execution_options(writes=False) as connection, connection.begin():
            yield connection

    def changed(self, connection: Connection) -> None:
        """Say, as part of a transaction, that keys or tenants change: other processes look at this."""
        connection.execute(update(_meta).where(_meta.c.name == "changes").values(value=_meta.c.value + 1))

    def changes(self, connection: Connection) -> int:
        """How often keys or tenants have changed."""
        return int(connection.scalar(select(_meta.c.value).where(_meta.c.name == "changes")) or 0)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def sqlite_url(path: Path) -> str:
    """The URL of a database in a file."""
    return f"sqlite:///{path.resolve()}"


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions in its own way, too late to be safe
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        # A writer that begins as a reader may find at its first write that somebody else wrote meanwhile.
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _reason(error: SQLAlchemyError) -> str:
    own = getattr(error, "orig", None)
    return str(own or error).splitlines()[0]
