"""Waiting for changes that other servers commit to the same PostgreSQL."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

__all__ = ["CHANNEL", "Listener"]

_log = logging.getLogger("tpeft_deploy.server")

CHANNEL = "'tpeft_' || md5(current_schema())"
"""SQL of the name of the channel: one for each schema, as channels belong to the whole database."""


class Listener:
    """A connection that listens; opened with the first wait, and again after it was lost.

    Args:
        engine: engine of the database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def wait(self, seconds: float) -> bool:
        """Wait for a change.

        Args:
            seconds: longest time to wait.

        Returns:
            Whether the time was waited for; false if the database cannot be listened to now, for the caller to wait.
        """
        try:
            for _ in self._driver().notifies(timeout=seconds, stop_after=1):
                pass
        except Exception as error:  # of SQLAlchemy, or of the driver
            _log.debug("cannot listen for changes: %s", error)
            self.close()
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                connection.invalidate()  # not returned to the pool: it listens
                connection.close()
            except SQLAlchemyError:
                pass

    def _driver(self) -> Any:
        if self._connection is None:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT", writes=False)
            self._connection = connection
            channel = connection.scalar(text(f"SELECT {CHANNEL}"))
            connection.exec_driver_sql(f"LISTEN {channel}")
        return self._connection.connection.driver_connection
