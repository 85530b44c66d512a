"""A line of JSON on stderr for each request: who asked for what, and what came of it; never what was in it."""

from __future__ import annotations

import time

import orjson

from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines
from tpeft_deploy.runtime.server.telemetry.request_record import Exchange

__all__ = ["AccessLog"]

_TEXT = 128  # characters of each text of a client


class AccessLog:
    """Tells of requests.

    Args:
        lines: writes them, in a thread of its own, so that a slow reader of stderr holds up no request.
    """

    def __init__(self, lines: LogLines) -> None:
        self._lines = lines

    def write(self, exchange: Exchange) -> None:
        """Log a request; dropped, and counted, where too many lines wait already."""
        self._lines.put(
            orjson.dumps(
                {
                    "time": round(time.time(), 3),
                    "request": exchange.request_id[:_TEXT],
                    "tenant": exchange.tenant[:_TEXT],
                    "key": exchange.key[:_TEXT],
                    "protocol": exchange.protocol,
                    "method": exchange.method[:_TEXT],
                    "route": exchange.route,
                    "task": exchange.task[:_TEXT],
                    "status": exchange.status,
                    "ms": round(1000 * exchange.seconds, 3),
                    "in": exchange.bytes_in,
                    "out": exchange.bytes_out,
                }
            )
        )
