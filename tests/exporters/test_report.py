"""The page that verify writes: self-contained, complete, the same each time, and honest about failures."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path

import pytest

from tests.helpers import nets
from tests.helpers.exporters.bundles import edit, minus
from tpeft_deploy import Adapter, Bundle, export_bundle, verify_bundle
from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.proof import per_target
from tpeft_deploy.exporters.report import render
from tpeft_deploy.exporters.verification import Verification
from tpeft_deploy.html import plots
from tpeft_deploy.html.plots import Bar, Cell, Dot


@pytest.fixture(scope="module")
def found(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    return verify_bundle(conv_bundle.path, report=tmp_path_factory.mktemp("report") / "page.html")


@pytest.fixture(scope="module")
def page(found: Verification) -> str:
    return render(found)


class Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> None:
    """Every tag is closed, and nothing is loaded from anywhere."""
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.findall(r"http|src=|href=|url\(|<(?:link|script|iframe|image|object)\b|@import", page)


def test_the_page_needs_nothing_and_shows_everything(page: str, found: Verification) -> None:
    check_page(page)
    assert page.count("<svg") == 5
    assert f"all {len(found.checks) + len(found.targets)} comparisons are within their limits" in page
    assert all(f"<th>{task}</th>" in page for task in found.tasks)
    assert found.bundle.manifest.base_digest in page
    assert len(re.findall("<circle", page)) == 2 * len(found.checks) + len(found.targets)
    assert "2 rows" in page
    assert "R_o 3, R_i 2" in page


def test_the_page_is_the_same_each_time(conv_bundle: Bundle, found: Verification, tmp_path: Path, page: str) -> None:
    again = verify_bundle(conv_bundle.path, report=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render(again)
    if [check.error for check in again.checks] == [check.error for check in found.checks]:
        assert render(again) == page


def test_every_target_is_checked_alone(found: Verification, conv_adapters: dict[str, Adapter]) -> None:
    single_changes = {(target.task, target.weights) for target in found.targets}
    expected = {(task, (name,)) for task, adapter in conv_adapters.items() for name in adapter.deltas}
    resized = {(task, ("head.bias", "head.weight")) for task in ("two", "wide")}  # neither runs without the other
    assert single_changes == expected | resized
    assert all(target.check.error <= 1e-6 for target in found.targets)
    kinds = {target.weights[0]: target.kinds for target in found.targets}
    assert kinds["stem.weight"] == ("conv",)
    assert kinds["up.weight"] == ("linear",)


def test_of_many_targets_some_are_checked_and_the_page_says_so(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(per_target, "MOST", 2)
    found = verify_bundle(conv_bundle.path, task="plain", report=tmp_path / "page.html")
    assert [target.weights[0] for target in found.targets] == ["depthwise.weight", "up.weight"]
    assert "Of tasks with more than 2, that many were run" in render(found)


def test_a_failure_is_on_the_page_with_all_others(own_bundle: Bundle, tmp_path: Path) -> None:
    edit(own_bundle, "factored.onnx", minus("TuckerLinear"))
    file = tmp_path / "page.html"
    with pytest.raises(NotEquivalent):
        verify_bundle(own_bundle.path, report=file)
    page = file.read_text(encoding="utf-8")
    check_page(page)
    # Two tasks change a linear: twice in the factored form at two sizes, and once each alone.
    assert "6 of 80 comparisons failed" in page, re.findall(r"\d+ of \d+ comparisons failed", page)
    assert page.count('class="cross"') == 2 * 4 + 2
    assert re.search(r"plain, up\.weight \(linear\): [0-9.e-]+</title></path>", page)
    assert re.search(r"plain, stem\.weight \(conv\): [0-9.e-]+</title></circle>", page)


def test_names_are_escaped(found: Verification, page: str) -> None:
    strange = "<b>&\"task'"
    check = Check("factored", strange, {"<i>": 2}, 1e-7, 1e-5, {"<out>": 1e-7})
    changed = Verification(found.bundle, "<script>", found.tasks, (check,), (), (("<what>", "<why>"),))
    shown = render(changed)
    assert "&lt;script&gt;" in shown
    for raw in (strange, "<i>", "<out>", "<script>", "<what>", "<why>"):
        assert raw not in shown
    check_page(shown)
    assert "<script" not in page


def test_gains_and_whole_tensors_have_their_place(tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    overrides: dict[str, tuple[int, ...]] = {"norm.running_mean": (8,), "up.bias": (16,)}
    adapter = nets.adapter_for(module, {"up.weight": (2, 2)}, seed=1, overrides=overrides)
    scaled = Adapter(
        adapter.deltas, adapter.overrides, gains={"up.weight": 1 + adapter.overrides["up.bias"][:, None] / 10}
    )
    bundle = export_bundle(module, {"a": scaled}, tmp_path / "bundle", example_inputs=inputs)
    found = verify_bundle(bundle.path, report=tmp_path / "page.html")
    assert {target.weights for target in found.targets} == {("up.weight",), ("norm.running_mean",), ("up.bias",)}
    assert found.targets[0].kinds == ("linear", "gain_0")
    assert ">gain<" in render(found)


def test_plots_take_every_number() -> None:
    rows = [("a", [Dot(0.0, "#111", "none"), Dot(inf, "#111", "no", good=False), Dot(nan, "#222", "no", good=False)])]
    for drawn in (
        plots.dots(rows, [1e-5, 2e-3]),
        plots.dots([("b" * 200, [Dot(3.0, "#111", "big", good=False)])], [1e-5]),
        plots.bars([Bar("none", 0, "0 bytes", "#111")]),
        plots.grid([], [("a", [])], "#111"),
        plots.grid(["t" * 300], [("w" * 300, [Cell("1", 7.0, "t"), None])], "#111"),
    ):
        check_page(drawn)
        numbers = [float(n) for n in re.findall(r'(?:\bx1?|cx|width)="([^"]+)"', drawn)]
        assert all(-1 <= number <= plots.WIDTH for number in numbers)
