"""Folding streams: each weight is merged when it is written, and never all of them at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "megabytes",
    [
        pytest.param(300, marks=pytest.mark.thorough),
        pytest.param(2300, marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],  # above what one protobuf holds
)
def test_the_peak_stays_below_2_2_times_the_weights(megabytes: int) -> None:
    command = [sys.executable, "benchmarks/fold_memory.py", "--megabytes", str(megabytes), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["weights, MB"] >= 0.9 * megabytes
    assert measured["peak / weights"] < 2.2, measured
