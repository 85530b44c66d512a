"""What the process of a command prints: its lines, and no other library's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import BASE, fail
from tpeft_deploy import Adapter, Bundle

ROOT = Path(__file__).parents[2]
PROGRESS = re.compile(r"\[(\d+ s|\d+ min \d\d s)\] ")
NOISE = """
import logging, warnings

def base():
    warnings.warn("of some library")
    logging.getLogger("some.library").warning("as loud")
    from tests.helpers import nets
    return nets.conv_net()
"""


def process(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a child process; progress, which a slow machine shows, is left out of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tpeft_deploy", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    done.stderr = "".join(line for line in done.stderr.splitlines(keepends=True) if not PROGRESS.match(line))
    return done


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, conv_adapters: dict[str, Adapter]) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    (place / "adapter.safetensors").write_bytes(conv_adapters["two"].to_bytes())
    return place


@pytest.mark.thorough
def test_commands_print_nothing_that_is_not_theirs(tmp_path: Path, adapter: Path, conv_bundle: Bundle) -> None:
    (tmp_path / "noisy.py").write_text(NOISE)
    bundle = tmp_path / "bundle"
    exported = process(
        "export", "bundle", "noisy:base", "--out", bundle, "--adapter", f"two={adapter}", PYTHONPATH=str(tmp_path)
    )
    assert (exported.returncode, exported.stderr) == (0, "")
    table, last = exported.stdout.splitlines()[:-1], exported.stdout.splitlines()[-1]
    assert table[0].split() == ["form", "task", "sizes", "error", "limit"]
    assert all(re.fullmatch(r"[a-z.]+ +\w+ +\S.* \d\S* +1e-05", line) for line in table[1:]), table
    assert last.startswith("task two: oracle ")

    verified = process("verify", bundle)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert verified.stdout.splitlines()[0].split() == ["form", "task", "sizes", "error", "limit", "oracle"]

    benched = process("bench", bundle, "--provider", "cpu", "--rows", "1", "--seconds", "0.1")
    assert (benched.returncode, benched.stderr) == (0, "provider: cpu (the CPU was asked for)\n")

    inspected = process("inspect", adapter, "--base", BASE)
    assert (inspected.returncode, inspected.stderr) == (0, "")


@pytest.mark.thorough
def test_debug_lets_other_libraries_speak(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISE)
    arguments = ("export", "folded", "noisy:base", adapter, "--dry-run")
    assert process(*arguments, PYTHONPATH=str(tmp_path)).stderr == ""
    assert "of some library" in process(*arguments, "--debug", PYTHONPATH=str(tmp_path)).stderr


def test_a_mistake_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    for arguments in (["adapter", "list", tmp_path], ["inspect", tmp_path / "missing"], ["run", tmp_path]):
        done = process(*arguments)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: ")


def test_misspelt_commands_options_and_tasks(conv_bundle: Bundle, tmp_path: Path) -> None:
    assert "Did you mean 'verify'?" in fail("verfy", code=2)
    assert "Did you mean 'bundle'?" in fail("export", "bunle", code=2)
    assert "Did you mean --task?" in fail("verify", "--tsk", "a", "b", code=2).replace("'", "")
    assert "got 'wyde'. Did you mean 'wide'? Add it" in fail("verify", conv_bundle.path, "--task", "wyde")
