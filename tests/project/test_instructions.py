"""What `make bench-check` makes of counts; counting itself takes valgrind and a minute."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.instructions import __main__ as bench_check
from benchmarks.instructions import counting
from benchmarks.instructions.comparison import Measured, compare
from benchmarks.instructions.paths import PATHS, REFERENCE

STORED = Measured({"Python": "3.11", "machine": "x86_64"}, 1000.0, {"open": 100.0, "run": 200.0})


def test_a_path_above_the_margin_fails(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = compare(STORED, replace(STORED, counts={"open": 104.0, "run": 205.0}))
    assert (verdict.dearer, verdict.cheaper, verdict.inapplicable) == (["open"], [], "")
    assert bench_check.told(verdict) == 1
    said = capsys.readouterr()
    assert "+4.00%" in said.out
    assert "more than 3 % dearer than stored: open." in said.err


def test_a_path_below_the_margin_asks_for_renewal(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = compare(STORED, replace(STORED, counts={"open": 90.0, "run": 200.0, "new": 5.0}))
    assert verdict.cheaper == ["new", "open"]
    assert bench_check.told(verdict) == 0
    assert "RENEW=1`: new, open" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "change", "why"),
    [
        (None, {}, "none are stored"),
        (STORED, {"environment": {"Python": "3.12", "machine": "x86_64"}}, "Python 3.11, this is 3.12"),
        (STORED, {"environment": {"Python": "3.11", "machine": "x86_64", "new": "1"}}, "new none, this is 1"),
        (STORED, {"reference": 1020.0}, "+2.0% instructions"),
        (STORED, {"reference": 980.0}, "-2.0% instructions"),
    ],
)
def test_counts_of_another_environment_fail_nothing(
    stored: Measured | None, change: dict[str, object], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dearer = replace(STORED, counts={"open": 200.0, "run": 200.0})
    verdict = compare(stored, replace(dearer, **change))  # type: ignore[arg-type]  # fields by name
    assert why in verdict.inapplicable
    assert bench_check.told(verdict) == 0
    assert "do not apply" in capsys.readouterr().out


def test_without_a_tool_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.setattr("sys.argv", ["bench-check"])
    assert counting.tool() is None
    assert bench_check.main() == bench_check.NOT_MEASURED
    assert "apt-get install valgrind" in capsys.readouterr().err


def test_renewed_counts_are_kept_by_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_check, "STORED", tmp_path / "counts.json")
    bench_check.store("callgrind", STORED)
    bench_check.store("perf", replace(STORED, reference=5.0))
    assert bench_check.stored_counts() == {"callgrind": STORED, "perf": replace(STORED, reference=5.0)}
    assert json.loads((tmp_path / "counts.json").read_text())["callgrind"]["counts"] == {"open": 100, "run": 200}


def test_ten_paths_are_measured_beside_the_reference() -> None:
    assert len(PATHS) == 10 + 1
    assert sorted([*bench_check.SERVED, *bench_check.OTHERS]) == sorted(PATHS)
    assert REFERENCE in bench_check.OTHERS
