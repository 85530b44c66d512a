"""`verify` and `export --dry-run` as a user meets them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.commands import BASE, call, fail, succeed
from tests.helpers.exporters.bundles import edit, flip_weights, minus, write
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.bundle import slots


def test_verify_prints_every_check(conv_bundle: Bundle, tmp_path: Path) -> None:
    document = json.loads(succeed("verify", conv_bundle.path, "--task", "two", "--json"))
    assert document["tasks"] == {"two": conv_bundle.tasks["two"]}
    assert all(check["error"] <= check["limit"] for check in document["checks"])
    result = call("verify", conv_bundle.path, "--base", BASE, "--report", tmp_path / "page.html")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["form", "task", "sizes", "error", "limit", "oracle"]
    assert len(lines) == 1 + 68 + 1
    assert lines[-1].split()[:4] == ["training", "library", "not", "checked"]
    assert result.stderr == f"report: {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_verify_says_what_it_left_out(own_bundle: Bundle) -> None:
    write(own_bundle, replace(own_bundle.manifest, rows="group", rows_reason="at 'x'"))
    assert "mixed rows        not checked" in succeed("verify", own_bundle.path)


def test_a_deviation_is_one_line_and_a_report(own_bundle: Bundle, tmp_path: Path) -> None:
    edit(own_bundle, "factored.onnx", minus("TuckerConvUp"))
    line = fail("verify", own_bundle.path, "--report", tmp_path / "page.html")
    assert "check the factored export of task 'plain' at batch 2: expected relative error <= 1e-05" in line
    assert "comparisons failed" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_an_altered_file_is_one_line_and_no_report(own_bundle: Bundle, tmp_path: Path) -> None:
    flip_weights(own_bundle)
    assert "weights.data" in fail("verify", own_bundle.path, "--report", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert "'nope'" in fail("verify", own_bundle.path, "--task", "nope")
    assert "no such directory" in fail("verify", tmp_path / "missing")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, conv_adapters: dict[str, Adapter]) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    for task, adapter in conv_adapters.items():
        (place / task).mkdir()
        (place / task / "adapter.safetensors").write_bytes(adapter.to_bytes())
    return place


def test_a_dry_run_tells_what_the_export_writes_and_writes_nothing(adapters: Path, conv_bundle: Bundle) -> None:
    before = sorted(adapters.rglob("*"))
    given = [text for task in conv_bundle.tasks for text in ("--adapter", f"{task}={adapters / task}")]
    out = adapters / "conv"
    plan = json.loads(succeed("export", "bundle", BASE, "--out", out, *given, "--dry-run", "--json"))
    assert sorted(adapters.rglob("*")) == before
    manifest = conv_bundle.manifest
    assert plan["name"] == manifest.name
    assert plan["rows"] is None
    assert plan["base_bytes"] == manifest.weight_bytes
    assert {(t["target"], t["kind"], tuple(t["shape"])) for t in plan["targets"]} == {
        (t.name, t.kind, t.shape) for t in manifest.targets
    }
    targets = {target.key: target for target in manifest.targets}
    planned = {(t["target"], t["kind"]): t for t in plan["targets"]}
    for task in plan["tasks"]:
        name = task["task"]
        stored = conv_bundle.adapter(name)
        assert task["bytes"] == stored.nbytes
        for key, filled in conv_bundle.fill(stored).items():
            entry = planned[targets[key].name, targets[key].kind]
            assert entry["ranks"][name] == slots.ranks_of(targets[key], filled)
            assert entry["bytes"][name] == sum(array.nbytes for array in filled.values())
        assert task["slot_bytes"] == sum(array.nbytes for array in conv_bundle.factors(name).values())


def test_a_dry_run_prints_tables_and_needs_no_out(adapters: Path) -> None:
    table = succeed("export", "bundle", BASE, "--adapter", f"two={adapters / 'two'}", "--dry-run")
    assert "two: R_i 2, R_o 3" in table
    assert "task two: 424 parameters, 1,696 bytes" in table
    assert "linear" in succeed("export", "bundle", BASE, "--dry-run")
    folded = json.loads(succeed("export", "folded", BASE, adapters / "two", "--dry-run", "--json"))
    assert {t["target"]: t["change"] for t in folded["targets"]}["head.weight"] == "override"
    assert folded["base_bytes"] - folded["bytes"] == 4 * (10 - 2) * (16 + 1)
    assert "folded: 3,864" in succeed("export", "folded", BASE, adapters / "two", "--dry-run")


def test_a_dry_run_refuses_what_the_export_refuses(adapters: Path) -> None:
    given = ("--adapter", f"two={adapters / 'two'}")
    assert "rank <= 2" in fail("export", "bundle", BASE, *given, "--dry-run", "--max-rank", 2)
    assert "name a task 'two'" in fail("export", "bundle", BASE, *given, "--dry-run", "--name", "two")
    assert "--out" in fail("export", "bundle", BASE, *given, code=2)
    assert "--out" in fail("export", "folded", BASE, adapters / "two", code=2)


def test_verify_asks_the_training_library(conv_bundle: Bundle, tmp_path: Path) -> None:
    line = fail("verify", conv_bundle.path, "--task", "two", "--against-source", tmp_path)
    assert "against the source" in line
    assert "Give base= (--base on the command line)" in line
