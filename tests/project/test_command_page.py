"""docs/command-line.md is what `make command-line` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ".ci/command_page.py"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "40"},
    )  # fmt: skip
    assert done.stdout == (ROOT / "docs" / "command-line.md").read_text(), "run `make command-line`"
