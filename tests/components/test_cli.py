"""The commands on a bundle of several components, and on the bases of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import components
from tests.helpers.commands import call as invoke
from tests.helpers.commands import fail, succeed
from tpeft_deploy import Bundle

BASE = "tests.helpers.components:pair_components"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter directories, and a bundle `pair` that the command line exported with two of them."""
    path = tmp_path_factory.mktemp("components")
    for task, adapter in components.adapters(components.pair()).items():
        (path / task).mkdir()
        (path / task / "adapter.safetensors").write_bytes(adapter.to_bytes())
    given = [text for task in ("both", "reading") for text in ("--adapter", f"{task}={path / task}")]
    document = json.loads(succeed("export", "bundle", BASE, "--out", path / "pair", *given, "--folded", "--json"))
    (path / "export.json").write_text(json.dumps(document))
    return path


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "pair", tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", ids=np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]))
    return tmp_path / "in.npz"


def test_export_of_a_factory_of_components(place: Path) -> None:
    document = json.loads((place / "export.json").read_text())
    assert list(Bundle.open(place / "pair").components) == ["vision", "text"]
    assert list(document["tasks"]) == ["both", "reading"]
    assert {check["form"].partition(" ")[0] for check in document["gate"]} == {"vision", "text"}
    assert all(check["error"] <= check["limit"] for check in document["gate"])
    assert (place / "pair" / "components" / "text" / "folded" / "reading.onnx").is_file()
    line = fail("export", "bundle", BASE, "--out", place / "other", "--pad", "ids=0")
    assert "with each Component" in line
    assert not (place / "other").exists()


def test_a_dry_run_is_what_the_export_writes(place: Path) -> None:
    given = ("export", "bundle", BASE, "--dry-run", "--adapter", f"both={place / 'both'}", "--name", "pair")
    plan = json.loads(succeed(*given, "--json"))
    bundle = Bundle.open(place / "pair")
    manifests = {name: part.manifest for name, part in bundle.components.items()}
    assert plan["base_bytes"] == sum(manifest.weight_bytes for manifest in manifests.values())
    assert {(t["component"], t["target"], t["kind"]) for t in plan["targets"]} == {
        (name, target.name, target.kind) for name, manifest in manifests.items() for target in manifest.targets
    }
    (task,) = plan["tasks"]
    assert task["bytes"] == bundle.adapter("both").nbytes
    assert task["slot_bytes"] == sum(array.nbytes for array in bundle.factors("both").values())
    assert "component  target" in succeed(*given)
    assert "with each Component" in fail(*given, "--pad", "ids=0")


def test_tasks_are_added_listed_and_removed(place: Path, own: Path) -> None:
    (entry,) = json.loads(succeed("adapter", "add", own, f"new={place / 'seeing'}@0.5", "--json"))["tasks"]
    assert entry["task"] == "new"
    assert entry["deltas"] == 2
    listed = json.loads(succeed("adapter", "list", own, "--json"))["tasks"]
    assert [task["task"] for task in listed] == ["both", "new", "reading"]
    assert [task["folded"] for task in listed] == [True, False, True]
    assert "seeing" not in succeed("adapter", "list", own)
    succeed("adapter", "remove", own, "new")
    assert list(Bundle.open(own).tasks) == ["both", "reading"]
    assert not list(own.rglob("new*"))


@pytest.mark.parametrize("base", ["bundle", "factory"])
def test_inspect_tells_forms_over_all_components(place: Path, base: str) -> None:
    given = place / "pair" if base == "bundle" else BASE
    document = json.loads(succeed("inspect", place / "both", "--base", given, "--json"))
    assert {entry["weight"] for entry in document["weights"]} == set(Bundle.open(place / "pair").adapter("both").deltas)
    assert all(entry["share"] is not None for entry in document["weights"])
    forms = {form["form"]: form for form in document["forms"]}
    assert all(form["possible"] for form in forms.values())
    bundle = Bundle.open(place / "pair")
    assert forms["banked"]["bytes"] == sum(array.nbytes for array in bundle.factors("both").values())
    assert forms["folded"]["bytes"] == sum(part.manifest.weight_bytes for part in bundle.components.values())
    assert (document["oracle"] or {}).get("task") == ("both" if base == "bundle" else None)


def test_conversion_to_a_file_for_each_component(place: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "both"
    shown: Any = succeed("convert", place / "both", out, "--to", "onnx-adapter", "--bundle", place / "pair", "--json")
    assert [Path(file["path"]).name for file in json.loads(shown)["files"]] == [
        "text.onnx_adapter",
        "vision.onnx_adapter",
    ]
    for name, part in Bundle.open(place / "pair").components.items():
        read = onnxruntime.AdapterFormat.read_adapter(str(out / f"{name}.onnx_adapter")).get_parameters()
        expected = part.factors("both")
        assert set(read) == set(expected)
        assert all(np.array_equal(read[key].numpy(), array) for key, array in expected.items())
    succeed("convert", place / "both", tmp_path / "lora", "--to", "tpeft", "--base", BASE)


def test_verification_names_the_report_of_each_component(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke("verify", place / "pair", "--base", BASE, "--report", page)
    assert result.exit_code == 0, result.stderr
    reports = [tmp_path / f"page.{name}.html" for name in ("vision", "text")]
    assert result.stderr.splitlines() == [f"report: {report}" for report in reports]
    assert all(report.read_text(encoding="utf-8").startswith("<!doctype html>") for report in reports)
    assert not page.exists()
    line = fail("verify", place / "pair", "--base", "tests.helpers.nets:text_net")
    assert "components vision, text" in line


def test_a_run_names_its_component(place: Path, batch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    arguments = ("run", place / "pair", "--input", batch, "--output", out, "--provider", "cpu")
    succeed(*arguments, "--component", "text", "--tasks", "both,reading")
    with np.load(out) as rows:
        (mixed,) = rows.values()
    for row, task in enumerate(("both", "reading")):
        succeed(*arguments, "--component", "text", "--task", task)
        with np.load(out) as alone:
            np.testing.assert_allclose(mixed[row], next(iter(alone.values()))[row], rtol=1e-5, atol=1e-6)
    assert "'vision', 'text'" in fail(*arguments, "--task", "both")
    assert "'sound'" in fail(*arguments, "--component", "sound")
