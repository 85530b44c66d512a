"""The command line in processes of its own, as one starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]
CODE = "from tpeft_deploy.cli import main; main()"
COMMAND = [sys.executable, "-c", CODE]

# Batches wait while the file HOLD is there, as they would for a long run; one that is to stop stops.
HELD = """
import os, time
from tpeft_deploy.cli import main
from tpeft_deploy.runtime.engine import Engine

def run_held(self, inputs, versions, options):
    while os.path.exists(os.environ["HOLD"]) and not options.terminate:
        time.sleep(0.005)
    return own(self, inputs, versions, options)

own, Engine.run_held = Engine.run_held, run_held
main()
"""


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def begin(*arguments: object, code: str = CODE) -> subprocess.Popen[str]:
    """A server that starts; whoever calls this ends it."""
    line = [sys.executable, "-c", code, "serve", *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@contextmanager
def server(
    *arguments: object, code: str = CODE, said: list[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and where it listens; `said` takes the lines before that."""
    process = begin(*arguments, code=code)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.match(r"serving on (http\S+)", line)
            if said is not None:
                said.append(line)
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
