"""A line of JSON on stderr for each request: who asked for what, and what came of it; never what was in it."""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import TextIO

import orjson

from tpeft_deploy.runtime.server.exchange import Exchange

__all__ = ["AccessLog"]

_MOST = 10_000  # lines that wait for a slow stderr


class AccessLog:
    """Writes in a thread of its own, so that a slow reader of stderr holds up no request.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="tpeft-access-log", daemon=True)
        self._thread.start()

    def write(self, exchange: Exchange) -> None:
        """Log a request; dropped, and counted, where too many wait already."""
        if self._lines.qsize() >= _MOST:
            self._dropped += 1
            return
        self._lines.put(
            orjson.dumps(
                {
                    "time": round(time.time(), 3),
                    "request": exchange.request_id,
                    "tenant": exchange.tenant,
                    "key": exchange.key,
                    "protocol": exchange.protocol,
                    "method": exchange.method,
                    "route": exchange.route,
                    "task": exchange.task[:128],
                    "status": exchange.status,
                    "ms": round(1000 * exchange.seconds, 3),
                    "in": exchange.bytes_in,
                    "out": exchange.bytes_out,
                }
            )
        )

    def close(self) -> None:
        """Write what waits, and end."""
        self._lines.put(None)
        self._thread.join(timeout=5)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                self._stream.write(f'{{"dropped":{dropped}}}\n')
            self._stream.write(line.decode() + "\n")
            if self._lines.empty():
                self._stream.flush()
        self._stream.flush()
