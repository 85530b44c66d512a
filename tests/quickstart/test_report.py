import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tpeft_deploy.quickstart.data import DIGITS, TASKS, Digits
from tpeft_deploy.quickstart.evaluate import FORMS, Answers
from tpeft_deploy.quickstart.report import render
from tpeft_deploy.quickstart.results import BaseResult, Results, Sample, SwitchingCost, TaskResult

ROWS = 20


def results() -> Results:
    tasks = tuple(
        TaskResult(
            task=task.name,
            classes=len(task.answers),
            base=0.1,
            torch=0.971,
            folded=0.972,
            factored=0.973,
            banked=0.974,
            errors=dict.fromkeys(FORMS, 2e-7),
            adapter_bytes=45_000,
            adapter_parameters=10_000,
            train_seconds=9.0,
        )
        for task in TASKS
    )
    return Results(
        out=Path("a <b>"),
        tasks=tasks,
        base=BaseResult(0.99, 0.99, 1e-7, 44_714, 178_856, 8.0),
        switching=SwitchingCost(300, 400.0, -1.5, 3400.0),
        sample=Sample(("rotated", "upright"), ("3", "up")),
        test_digits=ROWS,
        rows_per_batch=96,
        provider="cpu",
        seed=0,
        seconds={"train": 60.0, "export": 5.0, "measure": 2.0, "total": 70.0},
        versions={"torch": "2"},
    )


@pytest.fixture(scope="module")
def page() -> str:
    random = np.random.default_rng(0)
    answers, tests = {}, {}
    for name, meanings in [("base", DIGITS), *((task.name, task.answers) for task in TASKS)]:
        labels = np.arange(ROWS) % len(meanings)
        logits = np.eye(len(meanings), dtype=np.float32)[labels]
        base = random.normal(size=(ROWS, 10)).astype(np.float32)
        answers[name] = Answers(base, logits, logits, {"banked": logits})
        tests[name] = Digits(random.random((ROWS, 1, 16, 16), np.float32), labels)
    return render(results(), answers, tests)


def test_results_are_json() -> None:
    document = json.loads(json.dumps(results().to_json()))
    assert [entry["task"] for entry in document["tasks"]] == [task.name for task in TASKS]
    assert {"base", "torch", "folded", "factored", "banked"} <= set(document["tasks"][0])
    assert document["out"] == "a <b>"


def test_the_page_needs_nothing_else(page: str) -> None:
    assert "http" not in page
    assert set(re.findall(r'\bsrc="([a-z]+):', page)) == {"data"}
    assert not re.findall(r"<(?:link|script|iframe|image|object)\b", page)
    assert all(place.startswith("#") for place in re.findall(r'(?:url\(|href=")([^")]*)', page))


def test_every_tag_is_closed(page: str) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_the_page_shows_every_task_plot_and_picture(page: str) -> None:
    assert page.count("<svg") == 4
    assert page.count("<img") == 10 * (len(TASKS) + 1)
    for task in TASKS:
        assert f"<th>{task.name}</th>" in page
        assert task.about in page
    for value in ("10.0%", "97.1%", "97.2%", "97.3%", "97.4%", "2.0 · 10<sup>-7</sup>", "45 kB", "-2 µs"):
        assert value in page


def test_plots_take_the_colours_of_the_page(page: str) -> None:
    assert "currentColor" in page
    assert "#010203" not in page
    assert "#010204" not in page


def test_names_are_escaped(page: str) -> None:
    assert "cd a &lt;b&gt;" in page


def test_plots_do_not_share_identifiers(page: str) -> None:
    used = [set(re.findall(r'clipPath id="([^"]+)"', svg)) for svg in page.split("<svg")[1:]]
    for place, identifiers in enumerate(used):
        for other in used[place + 1 :]:
            assert not identifiers & other
