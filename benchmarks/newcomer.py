"""Seconds from a clone to an adapter trained, exported and answering over HTTP, step by step.

    python -m benchmarks.newcomer [--keep DIRECTORY]

Clones the repository as committed, runs `make quickstart` of README.md there, which installs everything, and then each
block of docs/tutorials/train-export-serve.md as printed, in the environment and the checkout that the first command
made.  No step is done that the pages do not name, but that the server gets a free port.  Downloads depend on the
network and on pip's cache; figures are for one machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

__all__ = ["follow", "main"]

ROOT = Path(__file__).parents[1]
README = "    make quickstart "
PAGE = Path("docs/tutorials/train-export-serve.md")


def main() -> None:
    """Run the path, and print the seconds of each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="clone into this empty directory, and keep it")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)  # in the clone's environment
    arguments = parser.parse_args()
    if arguments.follow:
        follow(Path.cwd() / PAGE)
        return
    with tempfile.TemporaryDirectory() as place:
        clone = (arguments.keep or Path(place)) / "tpeft_deploy"
        begun = time.monotonic()
        _timed("git clone", lambda: _run(["git", "clone", "--quiet", "--no-local", str(ROOT), str(clone)], Path.cwd()))
        if README not in (clone / "README.md").read_text():
            sys.exit("README.md does not name the command `make quickstart`")
        _timed("make quickstart", lambda: _run(["make", "--no-print-directory", "quickstart"], clone))
        _run([".venv/bin/python", "-m", "benchmarks.newcomer", "--follow"], clone)
        print(f"{time.monotonic() - begun:8.1f} s  in all", flush=True)


def follow(page: Path) -> None:
    """Do what the blocks of a page say in an empty directory, with this interpreter; the last must be answered.

    Args:
        page: page with fenced blocks.

    Raises:
        AssertionError: a command fails.
    """
    from tests.helpers.documents import blocks, reading

    text = page.read_text()
    with tempfile.TemporaryDirectory() as place, reading(Path(place)) as reader:
        for block in blocks(text):
            heading = text[: text.index(block.text)].rpartition("\n## ")[2].partition("\n")[0]
            first = block.title or block.text.strip().partition("\n")[0]
            _timed(f"{heading}: {first[:60]}", partial(reader.follow, block))
        answered = reader.names["answers"]["logits"]
    print(f"{'':10}  answered with logits of shape {answered.shape}", flush=True)


def _timed(step: str, do: Callable[[], object]) -> None:
    begun = time.monotonic()
    do()
    print(f"{time.monotonic() - begun:8.1f} s  {step}", flush=True)


def _run(command: list[str], place: Path) -> None:
    """Run a command; its failure ends the program with the command's status."""
    done = subprocess.run(command, cwd=place, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
