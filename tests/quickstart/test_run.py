"""The whole quickstart through the command line: with little training here, in full behind `make soak`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tpeft_deploy.quickstart
from tpeft_deploy.cli import main

pytestmark = pytest.mark.thorough  # the tutorial and the tests beside run its parts
FORMS = ("folded", "factored", "banked")


def check(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert [task["task"] for task in results["tasks"]] == ["rotated", "inverted", "mirrored", "shifted", "upright"]
    for task in results["tasks"]:
        for form in FORMS:
            assert abs(task[form] - task["torch"]) <= 0.002, task
            assert task["errors"][form] <= 1e-5, task
        assert task["torch"] - task["base"] >= 0.2, task
    assert results["base"]["error"] <= 1e-6
    assert results["seconds"]["total"] > 0
    return results


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quickstart with less training, and what it printed."""
    full = tpeft_deploy.quickstart.run_quickstart
    out = tmp_path_factory.mktemp("quick") / "my digits"
    told: list[Any] = []

    def shortened(*arguments: Any, **keywords: Any) -> Any:
        return full(*arguments, **{**keywords, "on_stage": told.append, "seed": 1, "effort": 0.5})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpeft_deploy.quickstart, "run_quickstart", shortened)
        done = CliRunner().invoke(main, ["quickstart", "--out", str(out), "--provider", "cpu"])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert (told[-1], told[-1].done + 1) == ("write the report", told[-1].total)
    return out, done.stdout


def test_accuracies_and_agreement(quick: tuple[Path, str]) -> None:
    check(quick[0])


def test_the_report_needs_nothing_else(quick: tuple[Path, str]) -> None:
    page = (quick[0] / "report.html").read_text()
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']+|@import|url\((?!#|["']?data:)""", page)
    assert outside == []
    assert page.count("<svg") >= 3


def test_the_next_commands_work(quick: tuple[Path, str]) -> None:
    out, printed = quick
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  ") and "tpeft-deploy" in line]
    assert [command[1] for command in commands] == ["adapter", "inspect", "run"]
    for command in commands:
        done = CliRunner().invoke(main, command[1:])
        assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    with np.load(out / "answers.npz") as answers:
        rows = [answers[f"logits.{i}"] for i in range(len(results["sample"]["tasks"]))]
        assert {len(row) for row in rows} == {2, 10}
        check_request(out, rows, results["sample"]["tasks"])


def check_request(out: Path, rows: list[np.ndarray], tasks: list[str]) -> None:
    """The request that lies beside the sample is the sample."""
    pixels, adapter = json.loads((out / "request.json").read_text())["inputs"]
    with np.load(out / "sample.npz") as sample:
        sent = np.array(pixels["data"], np.float32).reshape(pixels["shape"])
        np.testing.assert_array_equal(sent, sample["pixels"])
    assert adapter["data"] == tasks
    assert adapter["shape"] == [len(rows)]


def test_its_base_can_be_exported_from_where_it_lies(
    quick: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = quick
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(str(out))
    arguments = ["export", "folded", "digits_base:base", "adapters/upright", "--out", str(tmp_path / "m.onnx")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_full_quickstart_on_any_seed(tmp_path: Path, seed: int) -> None:
    tpeft_deploy.quickstart.run_quickstart(tmp_path / "quick", provider="cpu", seed=seed)
    check(tmp_path / "quick")
