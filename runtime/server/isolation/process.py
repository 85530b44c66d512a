"""Control of a reader process from the server."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits

__all__ = ["Outcome", "Process"]

_START_SECONDS = 60.0  # imports from a cold disk
_GRACE_SECONDS = 5.0  # time for a reader to end an upload after its wall limit
_LONGEST = 4096
_KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME")  # variables that a reader's Python may need


@dataclass(frozen=True)
class Outcome:
    """Outcome of the process of one upload.

    Attributes:
        status: exit status, or the negative number of the signal that ended it.
        late: whether it exceeded the wall limit.
        cpu: CPU time in seconds.
        rss: peak resident memory in bytes.
    """

    status: int
    late: bool
    cpu: float
    rss: int


class Process:
    """One reader process; only `abandon` and `kill` are thread-safe.

    Args:
        bundle: path of the bundle.
        program: path of the reader program.
    """

    def __init__(self, bundle: Path, program: Path) -> None:
        optimised = ["-O"] * sys.flags.optimize
        self._process = subprocess.Popen(
            [sys.executable, "-P", *optimised, str(program), str(os.getpid()), str(bundle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            bufsize=0,
        )
        self._stdin: IO[bytes] = self._process.stdin  # type: ignore[assignment]  # both are pipes
        self._stdout: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        self._lock = threading.Lock()  # guards signals: none may reach a process that reuses the pid
        self._ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process is running."""
        with self._lock:
            return self._process.poll() is None

    def wait_ready(self) -> bool:
        """Block until the process is ready; return whether it is."""
        self._ready = self._ready or self._line(_START_SECONDS) == b"ready\n"
        return self._ready

    def ask(self, directory: Path, of: str, limits: ParsingLimits) -> Outcome | None:
        """Parse an upload and return the outcome; None if the reader ended or had to be killed."""
        job = {
            "directory": str(directory),
            "of": of,
            "cpu_seconds": limits.cpu_seconds,
            "wall_seconds": limits.wall_seconds,
            "memory_bytes": limits.memory_bytes,
            "result_bytes": limits.result_bytes,
        }
        if not self._write(json.dumps(job).encode() + b"\n"):
            return None
        line = self._line(limits.wall_seconds + _GRACE_SECONDS)
        if line is None:
            return None
        answer = json.loads(line)
        status = os.waitstatus_to_exitcode(answer["status"])
        return Outcome(status, answer["late"], answer["cpu"], answer["rss"])

    def abandon(self) -> None:
        """Abort the current upload."""
        self._write(b"\n")

    def kill(self) -> None:
        """Kill the reader and the process of its upload."""
        with self._lock:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Terminate the reader and close its pipes; no other thread may use it."""
        self.kill()
        self._stdin.close()
        self._stdout.close()

    def _write(self, data: bytes) -> bool:
        try:
            return self._stdin.write(data) == len(data)
        except (OSError, ValueError):  # the process ended, or is closed
            return False

    def _line(self, seconds: float) -> bytes | None:
        until, found = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(self._stdout.fileno(), select.POLLIN)
        while not found.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or len(found) > _LONGEST:
                return None
            if poll.poll(math.ceil(1000 * left)):
                piece = self._stdout.read(_LONGEST)
                if not piece:
                    return None
                found += piece
        return found


def _environment() -> dict[str, str]:
    """Return the environment of a reader, without the server's variables, which may contain passwords."""
    once = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    if sys.dont_write_bytecode:
        kept["PYTHONDONTWRITEBYTECODE"] = "1"
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    return {**once, **kept, "PYTHONPATH": path, "LANG": "C.UTF-8"}
