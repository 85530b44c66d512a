"""`inspect` answers whether an adapter can be served, in which forms, and what that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.cli import main

BASE = "tests.helpers.nets:conv_net"


def inspect(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    assert "Traceback" not in result.stderr
    return document | {"by": {form["form"]: form for form in document["forms"]}}


def written(adapter: Adapter, place: Path) -> Path:
    place.mkdir()
    (place / "adapter.safetensors").write_bytes(adapter.to_bytes())
    return place


@pytest.fixture
def two(tmp_path: Path, conv_adapters: dict[str, Adapter]) -> Path:
    return written(conv_adapters["two"], tmp_path / "two")


def test_without_a_base_names_and_shapes_tell(two: Path, conv_adapters: dict[str, Adapter]) -> None:
    adapter, found = conv_adapters["two"], inspect(two)
    assert found["method"] == {"tpeft": len(adapter.deltas), "override": len(adapter.overrides)}
    assert found["by"]["factored"]["bytes"] == adapter.nbytes
    assert found["by"]["banked"]["rows"] is None
    assert found["by"]["folded"]["bytes"] is None
    assert "--base" in found["missing"][0]
    assert found["file_bytes"] == (two / "adapter.safetensors").stat().st_size


def test_with_a_model_it_is_what_an_export_plans(two: Path) -> None:
    found = inspect(two, "--base", BASE)
    assert all(form["possible"] for form in found["forms"])
    assert found["missing"] == []
    assert found["heads"]["head.weight"] == [10, 2]
    size = sum(p.numel() * 4 for p in nets.conv_net()[0].parameters())
    assert found["by"]["folded"]["bytes"] == pytest.approx(size, rel=0.1)  # statistics of norms beside them
    assert found["by"]["factored"]["bytes"] > 0


def test_with_a_bundle_it_is_fitted_and_the_oracle_named(two: Path, conv_bundle: Bundle) -> None:
    found = inspect(two, "--base", conv_bundle.path)
    assert found["by"]["banked"]["rows"] == conv_bundle.manifest.rows
    adapter = conv_bundle.adapter("two")
    slots = conv_bundle.fill(adapter)
    assert found["by"]["banked"]["bytes"] == sum(a.nbytes for own in slots.values() for a in own.values())
    assert found["oracle"]["task"] == "two"
    assert found["oracle"]["oracle"] == conv_bundle.oracle("two")["oracle"]
    table = CliRunner().invoke(main, ["inspect", str(two), "--base", str(conv_bundle.path)]).stdout
    assert "task two: oracle" in table
    assert "head head.weight: 2 rows, 10 in the base" in table
    assert f"method: tpeft x {len(adapter.deltas)}, override x" in table


def test_a_gain_that_no_branch_of_the_bundle_takes(tmp_path: Path, conv_bundle: Bundle) -> None:
    gains = {"up.weight": np.full((16, 1), 2.0, np.float32)}
    place = written(Adapter({}, gains=gains), tmp_path / "gained")
    assert all(form["possible"] for form in inspect(place, "--base", BASE)["forms"])
    found = inspect(place, "--base", conv_bundle.path)
    assert found["by"]["folded"]["possible"] is True
    assert found["by"]["banked"]["possible"] is False
    assert "a branch for its gain" in found["by"]["banked"]["reason"]
    assert "Export the bundle again" in found["by"]["banked"]["fix"]


@pytest.mark.parametrize("base", [(), ("--base", BASE)])
def test_a_refused_adapter_is_shown_with_the_reason(tmp_path: Path, base: tuple[str, ...]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "XLORA"}))
    save_file({"base_model.model.x.weight": np.ones(2)}, tmp_path / "adapter_model.safetensors")
    found = inspect(tmp_path, *base, code=1)
    assert found["by"]["any"]["possible"] is False
    assert "it routes between several changes" in found["by"]["any"]["reason"]
    assert "Serve it with PEFT" in found["by"]["any"]["fix"]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path), *base])
    assert "it routes between several changes" in shown.stdout
    assert len(shown.stderr.splitlines()) == 1


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, conv_adapters: dict[str, Adapter]) -> None:
    digests = {"stem.weight": weight_digest(np.zeros(3))}
    other = Adapter(conv_adapters["two"].deltas, base_digests=digests)
    found = inspect(written(other, tmp_path / "other"), "--base", BASE, code=1)
    assert "trained on another base" in found["by"]["any"]["reason"]


def test_a_base_that_cannot_be_exported_is_told(two: Path) -> None:
    found = inspect(two, "--base", f"{__name__}:without_inputs")
    assert {form["possible"] for form in found["forms"]} == {None}
    assert "example_inputs" in found["by"]["banked"]["reason"]


def without_inputs() -> Any:
    return nets.conv_net()[0]
