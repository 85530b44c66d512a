"""Counts of instructions by callgrind or perf, of paths that run in child processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.instructions.paths import PATHS

ROOT = Path(__file__).resolve().parents[2]
EVENT = "instructions:u"
SECONDS = 600.0


class NotCountedError(Exception):
    """A child did not run to its end."""


def tool() -> str | None:
    """Return the tool that counts here: callgrind, whose counts depend least on the processor, else perf, else None."""
    if shutil.which("valgrind"):
        return "callgrind"
    if shutil.which("perf"):
        tried = subprocess.run(
            ["perf", "stat", "-x,", "-e", EVENT, "true"], capture_output=True, text=True, check=False
        )
        if re.search(rf"^\d+,,{EVENT}", tried.stderr, re.MULTILINE):
            return "perf"
    return None


def by_callgrind(place: Path, names: Sequence[str]) -> dict[str, float]:
    """Count the instructions of one repetition of each of some paths, in one child.

    Args:
        place: directory of the bundle and adapters; the child writes into it.
        names: paths.
    """
    out = place / "callgrind.out"
    # Marks are calls of a function of the C library that nothing else calls.
    command = ["valgrind", "--tool=callgrind", "--dump-before=getppid", f"--callgrind-out-file={out}"]
    _run([*_fixed_addresses(), *command, *_child(place, "callgrind", names)])
    counts = {}
    for number, name in enumerate(names):
        part = (place / f"{out.name}.{2 * number + 2}").read_text()  # odd parts end where a count begins
        total = re.search(r"^totals: (\d+)", part, re.MULTILINE)
        if total is None:
            raise NotCountedError(f"callgrind wrote no total of {name}")
        counts[name] = int(total[1]) / PATHS[name][1]
    return counts


def by_perf(place: Path, names: Sequence[str]) -> dict[str, float]:
    """The same, in a child for each path."""
    counts = {}
    for name in names:
        shutil.rmtree(place / "state", ignore_errors=True)
        control, switch = os.pipe()
        done, say_done = os.pipe()
        try:
            command = ["perf", "stat", "-x,", "-e", EVENT, "-D", "-1", "--control", f"fd:{control},{say_done}"]
            said = _run(
                [*_fixed_addresses(), *command, *_child(place, "perf", [name])],
                {"PERF_CONTROL": str(switch), "PERF_DONE": str(done)},
                (control, switch, done, say_done),
            )
        finally:
            for handle in (control, switch, done, say_done):
                os.close(handle)
        found = re.search(rf"^(\d+),,{EVENT}", said, re.MULTILINE)
        if found is None:
            raise NotCountedError(f"perf counted nothing of {name}: {said.strip()[-300:]}")
        counts[name] = int(found[1]) / PATHS[name][1]
    return counts


def _fixed_addresses() -> list[str]:
    """Without random addresses, which order what is hashed by address; some containers forbid it."""
    fixed = ["setarch", "-R"]
    if not shutil.which("setarch"):
        return []
    works = subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode == 0
    return fixed if works else []


def _child(place: Path, mark: str, names: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.instructions.child", str(place), mark, *names]


def _run(command: Sequence[str], more: dict[str, str] | None = None, handles: tuple[int, ...] = ()) -> str:
    """Run a child with nothing of the caller's environment that could change what it does; returns its stderr."""
    fixed = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    env = {**fixed, **(more or {})}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, pass_fds=handles, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NotCountedError(f"{command[0]} did not end within {SECONDS:.0f} s") from error
    if done.returncode:
        raise NotCountedError(f"{' '.join(command[-2:])} exited with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stderr
