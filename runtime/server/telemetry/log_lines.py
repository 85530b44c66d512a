"""Lines for stderr, written by a separate thread: a pipe that nobody reads stops nothing but the log."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from typing import TextIO

__all__ = ["LogLines", "QueuedHandler", "clipped"]

_MOST = 10_000  # lines that wait
_MOST_BYTES = 8 << 20  # of them together
_LINE = 16_384  # characters of one
_TEXT = 256  # of what a client wrote
_PAUSE = 0.05


class LogLines:
    """Writes lines in the order in which they come; those that find no room are dropped and counted.

    Args:
        stream: destination; stderr by default, by its descriptor: a lock that a blocked write held would stop the
            process from ending.
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
        """Write a line soon, without waiting for anything."""
        with self._lock:
            if self._lines.qsize() >= _MOST or self._taken - self._written > _MOST_BYTES:
                self.dropped += 1
                return
            self._taken += len(line)
            self._lines.put(line)

    def say(self, text: str) -> None:
        """Write a text as a line."""
        self.put(text.encode("utf-8", "backslashreplace"))

    def close(self, timeout: float = 1.0) -> None:
        """Write what waits, as far as that is possible within some seconds."""
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
        except (OSError, ValueError):  # nobody will read it any more
            self.dropped += 1


class QueuedHandler(logging.Handler):
    """Hands log records on as lines of bounded length.

    Args:
        lines: writes them.
    """

    def __init__(self, lines: LogLines) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            self._lines.say(clipped(self.format(record), _LINE))
        except Exception:  # a log call never fails its caller
            self._lines.say(f"a record of {record.name} cannot be shown")


def clipped(text: str, most: int = _TEXT) -> str:
    """A text of bounded length; what is left out is counted."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} more)"


def _written(descriptor: int, data: bytes) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:  # another process made the pipe that both share so
        time.sleep(_PAUSE)
        return 0


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
