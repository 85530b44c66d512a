"""Binding of a store of adapters and a database to each other."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from tpeft_deploy.errors import ServerError, Unavailable
from tpeft_deploy.files import replace_text
from tpeft_deploy.runtime.server.registry import queries
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore

__all__ = ["bind_directory", "bind_store"]

_log = logging.getLogger("tpeft_deploy.server")


def bind_store(file: Path, database: Database, store: ObjectStore) -> None:
    """Bind an object store and a database to each other, or check that they belong together.

    A server that has used both starts without the store, and serves what it has cached.

    Args:
        file: file with the number that the store had when this server last saw it.
        database: database of the registry.
        store: object store of the adapters.

    Raises:
        ServerError: one of them has adapters, and they do not belong together.
        Unavailable: the store does not answer, and this server has not used it with the database before.
    """
    with database.reading() as connection:
        known = database.directory(connection)
    try:
        own = store.identity()
        if own is None or own != known:
            known = _bind(database, store)
    except Unavailable:
        if known is None or not file.is_file() or file.read_text() != str(known):
            raise
        _log.warning("the store of adapters does not answer: only cached adapters are served until it does")
        store.bind(known, new=False)
        return
    store.bind(known, new=False)
    if not file.is_file() or file.read_text() != str(known):
        replace_text(file, str(known), 0o600)


def bind_directory(directory: Path, database: Database, blobs: Blobs) -> None:
    """Bind a directory and a database to each other, or check that they belong together.

    Files that no row refers to are removed from the directory: with another database, all adapters would be.

    Raises:
        ServerError: one of them has adapters, and they do not belong together.
    """
    file = directory / "identity"
    _bound(
        database,
        lambda: int(file.read_text()) if file.exists() else None,
        blobs.any,
        lambda number: replace_text(file, str(number), 0o600),
        f"open the state in {directory}",
        "Give the state and the database_url that were used together before.",
    )


def _bind(database: Database, store: ObjectStore) -> int:
    """Bind a new store and a new database; of several servers, the first one does it."""
    return _bound(
        database,
        store.identity,
        store.any,
        lambda number: store.bind(number, new=True),
        "open the store of adapters",
        "Give the store_url and the database_url that were used together before.",
    )


def _bound(
    database: Database,
    identity: Callable[[], int | None],
    filled: Callable[[], bool],
    write: Callable[[int], None],
    doing: str,
    fix: str,
) -> int:
    """Return the number that a store of adapters and a database have in common; new ones are given one.

    Args:
        database: database of the registry.
        identity: returns the number of the store; None for a new store.
        filled: whether the store has any adapters.
        write: gives the store a number.
        doing: operation, for messages.
        fix: remedy, for messages.

    Raises:
        ServerError: one of them has adapters, and they do not belong together.
    """
    with database.writing() as connection:
        own, known = identity(), database.directory(connection)
        if own is not None and own == known:
            return own
        if filled() or queries.any_version(connection):
            raise ServerError(
                doing,
                expected="the database that its adapters are registered in",
                got="another one" if known is not None else "an empty one",
                fix=fix,
            )
        number = secrets.randbelow(2**31)
        write(number)
        database.bind(connection, number)
        return number
