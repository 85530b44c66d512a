"""A server as processes: started on one core, stopped while others are measured, its time and memory from /proc."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Failed", "Server", "free_port", "started"]

TICK = os.sysconf("SC_CLK_TCK")
PATIENCE = 120.0  # seconds; Ray takes most of a minute on a busy machine


class Failed(Exception):
    """A server did not start, or refused a request."""


@dataclass(frozen=True)
class Server:
    """A started process with those that it started.

    Args:
        process: the first.
        port: on which it serves HTTP.
        log: file of its standard output and error.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def processes(self) -> list[int]:
        """Ids of the process and all its descendants."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def spent(self) -> float:
        """Seconds of processor time."""
        total = 0
        for pid in self.processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICK

    def memory(self) -> float:
        """Bytes, pages that several processes share counted once."""
        texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.processes())
        return 1024.0 * sum(int(found[1]) for text in texts if (found := re.search(r"(?m)^Pss:\s+(\d+)", text)))

    def signal(self, number: signal.Signals) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def wait(self) -> None:
        """Return once the port accepts connections.

        Raises:
            Failed: the process ended, or took too long.
        """
        until = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    text = self.log.read_text(errors="replace")[-2000:]
                    raise Failed(f"{self.process.args!r} did not start:\n{text}") from None
                time.sleep(0.1)
            else:
                return


def free_port() -> int:
    """A port that nothing listens on: of the servers not all can choose one."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        found: int = bound.getsockname()[1]
        return found


@contextmanager
def started(command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """A server on the first core, until the block ends."""
    core = min(os.sched_getaffinity(0))
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    server = Server(process, port, log)
    try:
        server.wait()
        yield server
    finally:
        _end(server)


def _end(server: Server) -> None:
    """End it as its operator does, and what is left of it after ten seconds."""
    left = server.processes()
    server.signal(signal.SIGCONT)
    server.process.terminate()
    try:
        server.process.wait(10)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    for pid in left[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
