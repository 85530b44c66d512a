"""Binding of an object store and a database to each other."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from tpeft_deploy.errors import ServerError, Unavailable
from tpeft_deploy.files import replace_text
from tpeft_deploy.runtime.server.registry import queries
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore

__all__ = ["bind_store"]

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


def _bind(database: Database, store: ObjectStore) -> int:
    """Bind a new store and a new database; of several servers, the first one does it."""
    with database.writing() as connection:
        own, known = store.identity(), database.directory(connection)
        if own is not None and own == known:
            return own
        if store.any() or queries.any_version(connection):
            raise ServerError(
                "open the store of adapters",
                expected="the database that its adapters are registered in",
                got="another one" if known is not None else "an empty one",
                fix="Give the store_url and the database_url that were used together before.",
            )
        number = secrets.randbelow(2**31)
        store.bind(number, new=True)
        database.bind(connection, number)
        return number
