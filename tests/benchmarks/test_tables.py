"""The tables of `make bench`: how they are written, and what quotes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.tables import page, quoted, report
from benchmarks.tables.machine import Machine, this_machine
from benchmarks.tables.report import Measured
from benchmarks.tables.table import Row, Settings, Table
from tpeft_deploy.runtime.bench.results import Spread

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MACHINE = Machine("a <processor>", 2, 16.0, "Linux 6", {"Python": "3.11.9"}, "abc1234", 0.25)


@pytest.fixture
def tables() -> dict[str, Measured]:
    rows = (
        Row("one | row", {"mixed, ratio": Spread(1.04, 1.0849, 1.1), "ms": 12.345, "by": "a & b"}),
        Row("32 rows", {"mixed, ratio": Spread(0.8, 0.9, 1.0), "ms": 1234.5, "by": None}),
    )
    made = Table(
        "made", "By hand", "First.\n\nSecond <b>.", ("mixed, ratio", "ms", "by"), rows, {"one | row": "slower"}
    )
    plain = Table("plain", "Numbers", "Text.", ("MB",), (Row("x", {"MB": 3}), Row("y", {"MB": 0.0004})))
    return {own.name: Measured(own, MACHINE, "2026-11-28 12:00", "--threads 1", 61.0) for own in (made, plain)}


def test_json_gives_the_tables_back(tables: dict[str, Measured], tmp_path: Path) -> None:
    report.write(tmp_path / "results.json", tables)
    assert report.read(tmp_path / "results.json") == tables
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert document["made"]["table"]["rows"][0]["figures"]["mixed, ratio"]["median"] == 1.0849
    assert report.read(tmp_path / "none.json") == {}


def test_markdown(tables: dict[str, Measured]) -> None:
    lines = report.markdown(tables).splitlines()
    start = lines.index("## By hand")
    assert lines[start + 2 : start + 18] == [
        "First.",
        "",
        "Second <b>.",
        "",
        "|  | mixed, ratio | ms | by |",
        "|---|---|---|---|",
        "| one \\| row | 1.08 (1.04 - 1.10) | 12.3 | a & b |",
        "| 32 rows | 0.90 (0.80 - 1.00) | 1,234 |  |",
        "",
        "Behind:",
        "",
        "- **one | row**: slower",
        "",
        f"2026-11-28 12:00 UTC, `--only made --threads 1`, 61 s. {MACHINE.line()}.",
        "",
        "## Numbers",
    ]
    assert "| y | 4.0e-04 |" in lines


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_shows_all(tables: dict[str, Measured]) -> None:
    text = page.render(tables)
    elements = _Elements()
    elements.feed(re.sub(r"<(line|circle|rect|path)([^>]*)/>", r"<\1\2></\1>", text))
    assert not elements.open
    assert elements.seen.count("svg") == elements.seen.count("table") == 2
    assert "script" not in elements.seen
    assert "Second &lt;b&gt;." in text
    assert "a &lt;processor&gt;" in text


def test_quoted_figures_are_updated(tables: dict[str, Measured]) -> None:
    text = "It takes 7.77<!-- bench: made / one | row / mixed, ratio --> or 1<!-- bench: plain / x / MB -->."
    new = quoted.updated(text, tables)
    assert new == text.replace("7.77", "1.08").replace("1<!-- bench: plain", "3<!-- bench: plain")
    assert quoted.updated(new, tables) == new
    with pytest.raises(LookupError, match=r"cannot quote made / none / ms: expected a figure .* got none"):
        quoted.updated("1<!-- bench: made / none / ms -->", tables)


def test_unmarked_and_unknown_figures_are_found() -> None:
    marked = "0.81<!-- notes: python x --> and 5 %<!-- bench: a / b / c -->"
    assert quoted.unmarked("8 % less\n```\n7 ms\n```\n    6 ms\n`5 ms`, rank 8\n0.81 of it") == [
        "8 % less",
        "0.81 of it",
    ]
    assert quoted.unmarked(marked.replace("5 %", "5")) == []
    notes = "# N\n\n## `python x`\n\n| 0.81 |\n\n## `python y`\n\n0.9\n"
    assert quoted.noted(marked, notes) == []
    assert quoted.noted("0.9<!-- notes: python x -->", notes) == ["0.9 of python x"]


def test_the_readme_quotes_the_results() -> None:
    assert quoted.updated(README, report.read(RESULTS)) == README
    assert quoted.noted(README, quoted.NOTES.read_text(encoding="utf-8")) == []
    assert quoted.unmarked(README) == []


def test_the_files_are_those_of_the_results() -> None:
    results = report.read(RESULTS)
    assert {"forms", "limits"} <= set(results)
    assert (RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8") == report.markdown(results)
    assert (RESULTS.parent / "results.html").read_text(encoding="utf-8") == page.render(results)


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert {"Python", "onnxruntime", "numpy"} <= set(machine.versions)


def test_an_unknown_table_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.tables", "--only", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "expected names among forms, " in done.stderr


def test_a_lacking_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = __import__("benchmarks.tables.__main__", fromlist=["child"])
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("benchmarks.tables.__path__", [str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        command.child("lacking", Settings(tmp_path), tmp_path / "table.json")
    assert left.value.code == command.LACKING
    assert capsys.readouterr().err == "package no_such_package is not installed\n"
