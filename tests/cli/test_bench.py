"""`bench`: every field that people and programs read, on the command line and in the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import call, fail, succeed
from tests.helpers.components import two_component_bundle
from tests.helpers.server.text_bundle import text_bundle
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.bench import bench_bundle, cases, crowd, render
from tpeft_deploy.runtime.bench.measure import interleave, spread
from tpeft_deploy.runtime.sessions.providers import choose

ON_CPU = ("--provider", "cpu", "--threads", 1)


def test_the_document_and_the_page(conv_bundle: Bundle, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    before = {file: file.stat().st_mtime_ns for file in conv_bundle.path.rglob("*")}
    result = call("bench", conv_bundle.path, *ON_CPU, "--rows", "1,3", "--seconds", 1, "--json", "--report", page)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == ["provider: cpu (the CPU was asked for)", f"report: {page}"]
    assert {file: file.stat().st_mtime_ns for file in conv_bundle.path.rglob("*")} == before
    found = json.loads(result.stdout)
    assert found["bundle"] == conv_bundle.manifest.name
    assert found["threads"] == 1
    assert found["tasks"] == list(conv_bundle.tasks)
    measured = {(cost["rows"], cost["case"]): cost for cost in found["cases"]}
    alone = [case for case in cases.CASES if case not in ("mixed", "singles")]
    assert list(measured) == [(1, case) for case in alone] + [(3, case) for case in cases.CASES]
    for cost in found["cases"]:
        assert cost["repeats"] >= 5
        for field in ("ms", "ratio"):
            assert 0 < cost[field]["low"] <= cost[field]["median"] <= cost[field]["high"]
    assert measured[3, "plain"]["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    counts = [own["adapters"] for own in found["switching"]]
    assert counts == [2, 10, 30, 100, 300][: len(counts)]
    assert len(counts) == 5 or found["left_out"]
    assert found["cold"]["task"] in conv_bundle.tasks
    assert found["cold"]["load_ms"]["median"] > 0
    assert [own["bytes"] is None or own["bytes"] > 1 << 20 for own in found["memory"]] == [True] * 5
    assert found["usage"]["device_bytes"] > 0
    check_page(page.read_text(encoding="utf-8"), [*cases.CASES, *map(str, counts)])


def check_page(text: str, words: list[str]) -> None:
    class Reader(HTMLParser):
        tags: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            assert not {name for name, _ in attrs} & {"src", "href"}

    reader = Reader()
    reader.tags = []
    reader.feed(text)
    assert reader.tags.count("svg") == 2
    assert reader.tags.count("table") == 1
    assert "nan" not in text
    assert all(f">{word}<" in text for word in words)


def test_the_tables(conv_bundle: Bundle) -> None:
    lines = succeed("bench", conv_bundle.path, *ON_CPU, "--rows", "2", "--seconds", 0.1).splitlines()
    assert lines[0].split() == ["rows", "case", "ms", "ms", "quartiles", "ratio", "ratio", "quartiles"]
    assert [line.split()[1] for line in lines[1:9]] == list(cases.CASES)
    assert any(line.startswith("switch with 2 known, µs") for line in lines)


@pytest.mark.thorough
def test_every_component_has_its_figures(tmp_path: Path) -> None:
    bundle = two_component_bundle(tmp_path / "two")
    page = tmp_path / "page.html"
    found = json.loads(
        succeed("bench", bundle.path, *ON_CPU, "--rows", "1,2", "--seconds", 0.1, "--json", "--report", page)
    )
    measured = {(cost["component"], cost["rows"]) for cost in found["cases"]}
    assert measured == {(name, rows) for name in bundle.components for rows in (1, 2)}
    assert found["generation"] == []
    assert all(name in page.read_text() for name in bundle.components)
    lines = succeed("bench", bundle.path, *ON_CPU, "--rows", "1", "--seconds", 0.1).splitlines()
    assert lines[0].split()[0] == "component"


@pytest.mark.thorough
def test_a_bundle_that_generates_has_tokens_in_a_second(tmp_path: Path) -> None:
    bundle = text_bundle(tmp_path / "text")
    found = bench_bundle(bundle, provider="cpu", rows=[1], seconds=0.1, threads=1)
    assert [(cost.case, cost.rows) for cost in found.generation] == [("base", 4), ("one task", 4), ("mixed", 4)]
    assert all(cost.tokens_per_s.median > 0 for cost in found.generation)
    assert "tokens/s" in render(found)


def test_a_bundle_without_tasks_says_what_is_missing(own_bundle: Bundle) -> None:
    for task in own_bundle.tasks:
        own_bundle.remove(task)
    found = bench_bundle(own_bundle, provider="cpu", rows=[2], seconds=0.1, threads=1)
    assert [cost.case for cost in found.cases] == ["plain", "base"]
    assert (found.cold, list(found.switching)) == (None, [])
    assert [own.what for own in found.left_out] == ["everything but plain and base"]


def test_errors_are_one_line(conv_bundle: Bundle, tmp_path: Path) -> None:
    assert "no such directory" in fail("bench", tmp_path / "missing")
    assert "1,8,16" in fail("bench", conv_bundle.path, "--rows", "1,0", code=2)
    assert "--seconds" in fail("bench", conv_bundle.path, "--seconds", 0, code=2)


@pytest.fixture
def runtime(conv_bundle: Bundle) -> Iterator[Runtime]:
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as opened:
        yield opened


def test_the_cases_compute_what_they_say(conv_bundle: Bundle, runtime: Runtime) -> None:
    """The factored case runs with the task's factors, and a batch is the example, repeated."""
    inputs = cases.batch(conv_bundle, 5)
    example = conv_bundle.example()["pixels"]
    np.testing.assert_array_equal(inputs["pixels"], np.concatenate([example, example, example[:1]]))
    plain = cases.PlainSessions(conv_bundle, choose("cpu"), 1)
    folded = cases.fold_copy(conv_bundle, runtime)
    assert isinstance(folded, str)
    ways = cases.served(conv_bundle, runtime, plain, ["plain", "partial"], folded, 5)
    wanted = {"plain": runtime.run(inputs), "factored": runtime.run(inputs, "plain")}
    ran = ways["folded"]()["logits"]  # type: ignore[index]
    np.testing.assert_allclose(ran, runtime.run(inputs, next(iter(conv_bundle.tasks)))["logits"], atol=1e-5)
    assert runtime.residency()[folded] == "folded"
    for case, own in wanted.items():
        np.testing.assert_allclose(ways[case]()[0], own["logits"], atol=1e-5)  # type: ignore[index]
    turns = [ways["switched"]()["logits"] for _ in range(3)]  # type: ignore[index]
    np.testing.assert_array_equal(turns[0], turns[2])
    np.testing.assert_array_equal(turns[1], runtime.run(inputs, "partial")["logits"])


def test_batches_that_a_model_does_not_take_are_refused(conv_bundle: Bundle) -> None:
    from dataclasses import replace

    ports = tuple(replace(port, shape=(2, *port.shape[1:])) for port in conv_bundle.manifest.inputs)
    fixed = replace(conv_bundle, manifest=replace(conv_bundle.manifest, inputs=ports))
    assert len(cases.batch(fixed, 2)["pixels"]) == 2
    with pytest.raises(InputError, match="--rows 2"):
        cases.batch(fixed, 3)


def test_a_crowd_that_is_too_large_or_too_slow_says_so(
    conv_bundle: Bundle, runtime: Runtime, conv_adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = crowd.Crowd(conv_bundle, runtime, 1)
    assert many.grow(3, 60.0) is None
    assert len(runtime.tasks) == len(conv_adapters) + 2
    assert many.switching(0.01).adapters == 3
    assert "3 were loaded" in str(many.grow(9, -1.0))
    monkeypatch.setattr(crowd, "_BYTES", 1)
    assert "MiB" in str(many.grow(4, 60.0))


def test_every_case_is_timed_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def case(name: str) -> None:
        ran.append(name)
        cold = ran[-6:] != [name] * 6
        now[0] += 0.005 if cold else 0.001

    times = interleave({"a": lambda: case("a"), "b": lambda: case("b")}, 0.0)
    assert {name: len(own) for name, own in times.items()} == {"a": 5, "b": 5}
    assert all(second == pytest.approx(0.001) for own in times.values() for second in own)
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]).median == 3.0
