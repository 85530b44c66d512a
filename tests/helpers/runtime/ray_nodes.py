"""Nodes of a Ray cluster on this machine, each killed with all of its processes; run as a program, it holds them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tests.helpers.server.processes import ROOT
from tests.helpers.waiting import wait_until

MARK = "TPEFT_TEST_MARK"
NODE = "TPEFT_TEST_NODE"


def marked(variables: Mapping[str, str], title: str = "") -> list[int]:
    """Ids of the processes that have these variables, and of which the command line has a text."""
    found = []
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if not folder.name.isdigit() or not wanted <= {*(folder / "environ").read_bytes().split(b"\0")}:
                continue
            if title.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def kill(variables: Mapping[str, str]) -> None:
    """Kill the processes that have these variables, and those that they start meanwhile."""

    def gone() -> bool:
        left = marked(variables)
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return not left

    wait_until(gone, "the end of all processes")


class Nodes:
    """The nodes: a head that runs nothing of the application, and others.

    Args:
        holder: the process that starts them.
        mark: value of MARK in the environment of all.
    """

    def __init__(self, holder: subprocess.Popen[str], mark: str) -> None:
        self._holder = holder
        self.mark = mark
        self.address = self._line()
        self.running: list[str] = []
        self._started = 0

    def add(self) -> str:
        """Start one more; return its name."""
        self._started += 1
        name = f"node-{self._started}"
        stdin: IO[str] | None = self._holder.stdin
        assert stdin is not None
        stdin.write(f"{name}\n")
        stdin.flush()
        assert self._line() == name
        self.running.append(name)
        return name

    def processes(self, name: str, title: str = "") -> list[int]:
        """Ids of the processes of a node of which the command line has a text."""
        return marked({MARK: self.mark, NODE: name}, title)

    def kill(self, name: str) -> None:
        """Kill all processes of a node, as when its machine is lost."""
        self.running.remove(name)
        kill({MARK: self.mark, NODE: name})

    def _line(self) -> str:
        assert self._holder.stdout is not None
        for line in self._holder.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise AssertionError("no node was started")


@contextmanager
def nodes(log: Path, environment: Mapping[str, str]) -> Iterator[Nodes]:
    """Start a head.

    Args:
        log: file for what is said.
        environment: variables of all processes.
    """
    mark = uuid.uuid4().hex
    own = {**os.environ, **environment, MARK: mark, "RAY_USAGE_STATS_ENABLED": "0"}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as stderr:
        holder = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=ROOT, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stderr, text=True,
        )  # fmt: skip
    try:
        yield Nodes(holder, mark)
    finally:
        kill({MARK: mark})
        holder.communicate()


def main() -> None:
    from ray.cluster_utils import Cluster

    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    print(f"> {own.address}", flush=True)
    for line in sys.stdin:
        own.add_node(num_cpus=4, env_vars={NODE: line.strip()})
        print(f"> {line.strip()}", flush=True)


if __name__ == "__main__":
    main()
