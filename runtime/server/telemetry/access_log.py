"""Access log: a line of JSON on stderr for each request, with caller, route and result but never its content."""

from __future__ import annotations

import time

import orjson

from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines
from tpeft_deploy.runtime.server.telemetry.request_record import RequestRecord

__all__ = ["AccessLog"]

_TEXT = 128  # maximum characters of each client string


class AccessLog:
    """Access log.

    Args:
        lines: writer with a dedicated thread, so that a slow reader of stderr does not block requests.
    """

    def __init__(self, lines: LogLines) -> None:
        self._lines = lines

    def write(self, record: RequestRecord) -> None:
        """Log a request; dropped and counted if too many lines are queued."""
        self._lines.put(
            orjson.dumps(
                {
                    "time": round(time.time(), 3),
                    "request": record.request_id[:_TEXT],
                    "tenant": record.tenant[:_TEXT],
                    "key": record.key[:_TEXT],
                    "protocol": record.protocol,
                    "method": record.method[:_TEXT],
                    "route": record.route,
                    "task": record.task[:_TEXT],
                    "status": record.status,
                    "ms": round(1000 * record.seconds, 3),
                    "in": record.bytes_in,
                    "out": record.bytes_out,
                }
            )
        )
