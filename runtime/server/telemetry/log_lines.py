"""Lines for stderr, written by a separate thread, so that a blocked pipe stops only the log."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from typing import TextIO

__all__ = ["LogLines", "QueuedHandler", "clipped"]

_MOST = 10_000  # maximum queued lines
_MOST_BYTES = 8 << 20  # maximum bytes of all queued lines
_LINE = 16_384  # maximum characters of a line
_TEXT = 256  # maximum characters of a client string
_PAUSE = 0.05


class LogLines:
    """Bounded FIFO queue of lines with a writer thread; lines beyond the bound are dropped and counted.

    Args:
        stream: destination; by default the file descriptor of stderr, without the lock of `sys.stderr`: held by a
            blocked write, it would prevent the process from exiting.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._descriptor = _descriptor(self._stream) if stream is None else None
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._taken = self._written = 0  # bytes
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="tpeft-log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Queue a line without blocking."""
        with self._lock:
            if self._lines.qsize() >= _MOST or self._taken - self._written > _MOST_BYTES:
                self.dropped += 1
                return
            self._taken += len(line)
            self._lines.put(line)

    def say(self, text: str) -> None:
        """Queue a text as a line."""
        self.put(text.encode("utf-8", "backslashreplace"))

    def close(self, timeout: float = 1.0) -> None:
        """Write the queued lines, for at most `timeout` seconds."""
        self._lines.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        told = 0
        while (line := self._lines.get()) is not None:
            if self.dropped != told:
                self._write(b'{"dropped":%d}\n' % (self.dropped - told))
                told = self.dropped
            self._write(line + b"\n")
            self._written += len(line)

    def _write(self, data: bytes) -> None:
        try:
            if self._descriptor is None:
                self._stream.write(data.decode("utf-8", "backslashreplace"))
                if self._lines.empty():
                    self._stream.flush()
                return
            while data:
                data = data[_written(self._descriptor, data) :]
        except (OSError, ValueError):  # the reader closed the pipe
            self.dropped += 1


class QueuedHandler(logging.Handler):
    """Logging handler that queues records as lines of bounded length.

    Args:
        lines: queue of lines.
    """

    def __init__(self, lines: LogLines) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            self._lines.say(clipped(self.format(record), _LINE))
        except Exception:  # a logging call must not raise
            self._lines.say(f"a record of {record.name} cannot be shown")


def clipped(text: str, most: int = _TEXT) -> str:
    """Truncate a text; the number of omitted characters is appended."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} more)"


def _written(descriptor: int, data: bytes) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:  # another process made the shared pipe non-blocking
        time.sleep(_PAUSE)
        return 0


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
