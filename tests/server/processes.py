"""The command line in processes of its own, as one starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from tpeft_deploy.cli import main; main()"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def begin(*arguments: object) -> subprocess.Popen[str]:
    """A server that starts; whoever calls this ends it."""
    return subprocess.Popen([*COMMAND, "serve", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@contextmanager
def server(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and where it listens."""
    process = begin(*arguments)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.match(r"serving on (http\S+)", line)
            if found:
                yield process, found[1]
                return
        raise AssertionError("the server did not start")
    finally:
        process.kill()
        process.communicate()


def grpc_address(process: subprocess.Popen[str]) -> str:
    """Where a server listens for gRPC, which it says after where it listens for HTTP."""
    assert process.stderr is not None
    found = re.match(r"serving gRPC on (\S+)", process.stderr.readline())
    assert found is not None
    return found[1]
