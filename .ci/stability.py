"""Run the tests again and again, each time in another order and beside busy processes; report what fails and how.

    python .ci/stability.py [--rounds N] [--neighbours N] [--seed N] [-- PYTEST ARGUMENTS]

Nothing stops it before the last round; it exits with 1 if any test failed in any of them.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Ends with the process that began it, however that ends.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?|\S+)(?: - .*)?$", re.MULTILINE)
_COUNTS = re.compile(r"^=* ?(\d+ \w+.* in [\d.]+s.*?) ?=*$", re.MULTILINE)


def main() -> int:
    asked = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends pytest and the neighbours too
    logs = Path(tempfile.mkdtemp(prefix="stability-"))
    seeds = random.Random(asked.seed)
    failures: dict[str, list[int]] = defaultdict(list)
    print(f"{asked.rounds} rounds beside {asked.neighbours} busy processes; logs in {logs}", flush=True)
    with busy(asked.neighbours):
        for number in range(1, asked.rounds + 1):
            seed = seeds.randrange(1 << 32)
            began = time.monotonic()
            failed, counts = run_once(seed, asked.pytest, logs / f"{seed}.log")
            print(f"round {number}, seed {seed}: {counts} [{time.monotonic() - began:.0f} s]", flush=True)
            for test in failed:
                print(f"    failed: {test}", flush=True)
                failures[test].append(seed)
    for test, own in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"\n{test}: failed in {len(own)} of {asked.rounds} rounds; to repeat:")
        for seed in own:
            print(f"    PYTHONHASHSEED={seed} {shlex.join(command(seed, asked.pytest))}")
    print(f"\n{len(failures)} unstable tests" if failures else f"\nall tests passed in {asked.rounds} rounds")
    return 1 if failures else 0


def command(seed: int, arguments: Sequence[str]) -> list[str]:
    """What runs the tests in the order of a seed; a later `-n` in `arguments` takes precedence."""
    return [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "randomly", f"--randomly-seed={seed}", *arguments]


def run_once(seed: int, arguments: Sequence[str], log: Path) -> tuple[list[str], str]:
    """The tests that failed in one round, and pytest's last line."""
    own = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run(command(seed, arguments), cwd=ROOT, env=own, stdout=file, stderr=file, check=False)
    text = log.read_text(errors="replace")
    counts = _COUNTS.findall(text)
    failed = list(dict.fromkeys(_FAILED.findall(text)))
    if done.returncode and not failed:
        failed = [f"pytest itself (exit code {done.returncode})"]
    return failed, counts[-1] if counts else f"exit code {done.returncode}"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    neighbours = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--neighbours", type=int, default=os.cpu_count() or 1, help="busy processes; one per core")
    parser.add_argument("--seed", type=int, default=None, help="of the rounds' seeds; by default another every time")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --: files, -k, -n")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
