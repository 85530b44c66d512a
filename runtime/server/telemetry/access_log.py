"""Access log: a line of JSON on stderr for each request, with caller, route and result but never its content."""

from __future__ import annotations

import time

import orjson

from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines

__all__ = ["AccessLog"]

_TEXT = 128  # maximum characters of each client string


class AccessLog:
    """Access log.

    Args:
        lines: writer with a dedicated thread, so that a slow reader of stderr does not block requests.
    """

    def __init__(self, lines: LogLines) -> None:
        self._lines = lines

    def write(self, context: RequestContext) -> None:
        """Log a request; dropped and counted if too many lines are queued."""
        self._lines.put(
            orjson.dumps(
                {
                    "time": round(time.time(), 3),
                    "request": context.request_id[:_TEXT],
                    "tenant": context.tenant[:_TEXT],
                    "key": context.key[:_TEXT],
                    "protocol": context.protocol,
                    "method": context.method[:_TEXT],
                    "route": context.route,
                    "task": context.task[:_TEXT],
                    "status": context.status,
                    "ms": round(1000 * context.seconds, 3),
                    "in": context.bytes_in,
                    "out": context.bytes_out,
                }
            )
        )
