"""The script for CUDA machines is known to run: on the CPU, as far as that can answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_models
from benchmarks.gpu_fixed import NeedsCuda, Place
from tpeft_deploy.runtime.sessions.providers import Choice

NEED_CUDA = {"memory limit", "(e) copies", "(f) shared weights"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gpu")
    gpu_models.build(place, layers=1, width=64, channels=8, large=(1, 64), wide=64)
    return place


@pytest.mark.parametrize("name", gpu.checks())
@pytest.mark.thorough
def test_every_check(models: Path, name: str) -> None:
    place = Place(models, Choice("cpu", "a test"), seconds=0.0)
    if name in NEED_CUDA:
        with pytest.raises(NeedsCuda):
            gpu.checks()[name](place)
        return
    report = gpu.checks()[name](place)
    assert report.claims or report.figures
    assert [claim for claim in report.claims if not claim["holds"]] == []


@pytest.mark.thorough
def test_a_check_that_fails_is_recorded_and_the_others_go_on(models: Path, tmp_path: Path) -> None:
    (tmp_path / "graphs").symlink_to(models / "graphs")  # and no bundles
    command = [sys.executable, "-m", "benchmarks.gpu", "run", str(tmp_path), "--provider", "cpu", "--seconds", "0"]
    command += ["--out", str(tmp_path / "out"), "--only", "factored, encoder", "matmul", "copies"]
    subprocess.run(command, cwd=gpu.ROOT, check=True, capture_output=True, timeout=120)
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["checks"]
    assert found["factored, encoder"]["status"].startswith("BundleError")
    assert found["(a) rank 0, matmul"]["status"] == "done"
    assert found["(e) copies"]["status"] == "needs CUDA"
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "| (a) rank 0, matmul | rank 0 matmul, plain: error | " in table
    assert "| factored, encoder | BundleError" in table
