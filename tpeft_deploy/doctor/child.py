"""Questions that a child process answers, because a defective library may crash or hang whoever loads it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from tpeft_deploy.errors import brief

__all__ = ["ChildAnswer", "ask"]

SECONDS = 120.0


@dataclass(frozen=True)
class ChildAnswer:
    """Lines that a child printed, and how it ended.

    Args:
        lines: JSON objects that it printed.
        failure: why it did not end as it should, as a line; None if it did.
    """

    lines: list[dict[str, Any]]
    failure: str | None


def ask(module: str, *arguments: str, seconds: float = SECONDS) -> ChildAnswer:
    """Run a module of this package in a child process.

    Args:
        module: dotted name; it prints JSON objects, one on a line.
        arguments: its arguments.
        seconds: time after which it is killed.
    """
    # -P keeps the working directory out of the path, and PYTHONPATH adds what this process imports from.
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    command = [sys.executable, "-P", "-W", "ignore", "-m", module, *arguments]
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        return ChildAnswer(_objects(error.stdout or b""), f"no answer within {seconds:.0f} s")
    except OSError as error:
        return ChildAnswer([], f"no process could be started ({error})")
    return ChildAnswer(_objects(done.stdout), _failure(done.returncode, done.stderr))


def _objects(output: bytes) -> list[dict[str, Any]]:
    found = []
    for line in output.decode(errors="replace").splitlines():
        try:
            read = json.loads(line)
        except ValueError:  # a library's own words
            continue
        if isinstance(read, dict):
            found.append(read)
    return found


def _failure(code: int, stderr: bytes) -> str | None:
    if code == 0:
        return None
    if code < 0:
        try:
            return f"the process crashed with {signal.Signals(-code).name}"
        except ValueError:
            return f"the process crashed with signal {-code}"
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return brief(lines[-1]) if lines else f"the process ended with exit code {code}"
