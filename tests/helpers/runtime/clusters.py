"""A cluster of Ray Serve in other processes, found and ended by a mark in their environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runtime.ray_nodes import MARK, kill, marked
from tests.helpers.server.processes import COMMAND, ROOT
from tests.helpers.waiting import wait_until


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    url: str
    grpc: str
    process: subprocess.Popen[bytes]
    mark: str

    def processes(self, title: str = "") -> list[int]:
        """Ids of its processes of which the command line has a text."""
        return marked({MARK: self.mark}, title)

    def stop(self) -> None:
        """Stop it as an operator does, and wait until nothing of it runs."""
        self.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.process.poll() is not None, "the end of the command")
        wait_until(lambda: not self.processes(), "the end of all processes")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def cluster(
    bundle: Path, state: Path, *arguments: object, environment: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Start a cluster on this machine, with gRPC.

    Args:
        bundle: the bundle.
        state: directory of the registry; the log is beside it.
        arguments: further arguments of the command.
        environment: further variables of its processes.
    """
    port, grpc, mark = _free_port(), _free_port(), (environment or {}).get(MARK) or uuid.uuid4().hex
    line = [*COMMAND, "cluster", "up", bundle, "--state", state, "--port", port, "--grpc-port", grpc]
    line += ["--provider", "cpu", "--threads", 1, "--cpus", 0.1, *arguments]
    own_environment = {
        **os.environ,
        MARK: mark,
        **(environment or {}),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    log = state.with_suffix(".log")  # not a pipe, which nobody would empty
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [str(part) for part in line], cwd=ROOT, env=own_environment, stderr=stderr, stdout=stderr
        )
    own = Cluster(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc}", process, mark)
    try:
        wait_until(lambda: "\nserving on" in log.read_text() or process.poll() is not None, "the start of the cluster")
        assert process.poll() is None, log.read_text()[-4000:]
        yield own
    finally:
        process.kill()
        kill({MARK: mark})
        process.wait()
