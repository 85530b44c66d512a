# Written by .ci/unasync.py from asynchronous/status.py; change that file, then run `make client`.
"""The blocking client: health and metadata."""

from __future__ import annotations

from tpeft_deploy.client import calls
from tpeft_deploy.client.answers import Document
from tpeft_deploy.client.blocking.connection import ServerConnection

__all__ = ["StatusCalls"]


class StatusCalls(ServerConnection):
    """Health, metadata and statistics."""

    def ready(self, model: str | None = None) -> bool:
        """Return whether the server takes requests.

        Args:
            model: model to ask about, `name` or `name@version` (default the server as a whole).

        Raises:
            Unavailable: there is no connection.
        """
        return self._do(calls.ready(model))

    def live(self) -> bool:
        """Return whether the server's process works.

        Raises:
            Unavailable: there is no connection.
        """
        return self._do(calls.live())

    def metadata(self, model: str | None = None) -> Document:
        """Return metadata: name, version and extensions of the server, or versions, inputs and outputs of a model.

        Args:
            model: model to ask about, `name` or `name@version` (default the server).
        """
        return self._do(calls.metadata(model))

    def statistics(self, model: str | None = None) -> Document:
        """Return counts and durations of requests per model.

        Args:
            model: model to ask about, `name` or `name@version` (default all that the key may see).
        """
        return self._do(calls.statistics(model))
