"""Schema migrations of the registry's database.

Alembic runs the scripts in `versions` inside one transaction that holds the writers' lock: an interrupted migration
leaves the earlier schema.  To change a table: change `schema.py`, raise `SCHEMA`, and add a script with the new
number as its revision; a test compares the two.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, insert, inspect, select

from tpeft_deploy.errors import ServerError, VersionError
from tpeft_deploy.files import new_file
from tpeft_deploy.runtime.server.registry import schema
from tpeft_deploy.runtime.server.registry.files.disk import storing

__all__ = ["copy_sqlite", "create", "stored_schema", "upgrade"]

_alembic_lock = threading.Lock()  # Alembic's `context` and `op` are global in a process
_revision = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))


def stored_schema(connection: Connection) -> int | None:
    """Schema number of a database; None without tables.

    Raises:
        VersionError: the schema is newer than this version of the server.
    """
    tables = inspect(connection)
    if not tables.has_table(schema.meta.name):
        return None
    compatible = connection.scalar(select(schema.meta.c.value).where(schema.meta.c.name == "schema"))
    if tables.has_table(_revision.name):
        found = connection.scalar(select(_revision.c.version_num))
    else:  # written before migrations
        found = "0002" if tables.has_table(schema.history.name) else "0001"
    number = int(found) if found and found.isdecimal() else None
    if compatible != schema.COMPATIBLE or number is None or number > schema.SCHEMA:
        raise VersionError(
            "open the server's database",
            expected=f"schema {schema.SCHEMA} or earlier",
            got=found if compatible == schema.COMPATIBLE else f"{found}, for servers of generation {compatible}",
            fix="Start the version of tpeft-deploy that wrote it.",
        )
    return number


def create(connection: Connection) -> None:
    """Create the tables of a new database."""
    schema.metadata.create_all(connection)
    for name, value in (("schema", schema.COMPATIBLE), ("changes", 0), ("tasks", 0)):
        connection.execute(insert(schema.meta).values(name=name, value=value))
    _stamp(connection, schema.SCHEMA)


def upgrade(connection: Connection, number: int) -> None:
    """Bring a database of an earlier schema up to date, as part of a transaction.

    Args:
        connection: connection with a transaction that holds the writers' lock.
        number: schema number of the database.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # its lines say less than the server's
    from alembic import command
    from alembic.config import Config

    if not inspect(connection).has_table(_revision.name):
        _stamp(connection, number)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _alembic_lock:
        command.upgrade(config, "head")


def copy_sqlite(file: Path) -> Path:
    """Copy a SQLite database beside it, durably; an earlier copy of that name is replaced.

    Args:
        file: path of the database.

    Returns:
        Path of the copy, `NAME.before-N` for the schema number N that comes next.

    Raises:
        InsufficientStorage: the disk is full.
        ServerError: the copy cannot be written.
    """
    copy = file.with_name(f"{file.name}.before-{schema.SCHEMA}")
    doing = f"copy {file.name} before its migration"
    try:
        with storing(doing):
            for partial in copy.parent.glob(f".{copy.name}.*"):  # an interrupted copy
                partial.unlink()
            with (
                new_file(copy, 0o600) as target,
                closing(sqlite3.connect(file)) as source,
                closing(sqlite3.connect(target)) as written,
            ):
                source.backup(written)
    except OSError as error:
        raise ServerError(doing, problem=error.strerror or str(error)) from error
    return copy


def _stamp(connection: Connection, number: int) -> None:
    _revision.create(connection, checkfirst=True)
    connection.execute(insert(_revision).values(version_num=f"{number:04}"))
