"""`export --quantise` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.helpers.commands import BASE, fail, succeed
from tpeft_deploy import Adapter, Bundle


def test_a_quantised_bundle_tells_its_distance(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    document = json.loads(succeed("export", "bundle", BASE, "--out", place, "--quantise", "int8", "--json"))
    (entry,) = document["quantised"]
    assert entry["quantise"] == "int8"
    assert entry["activations"] == "int8"
    assert 0 < entry["error"] < 0.05
    assert 0.99 < entry["cosine"] <= 1.000001
    assert entry["weights"] == len(Bundle.open(place).manifest.quantised.weights)  # type: ignore[union-attr]
    assert "from the base in floating point: error" in succeed("verify", place)
    assert json.loads(succeed("verify", place, "--json"))["quantised"] == document["quantised"]


def test_a_dry_run_counts_the_bytes_of_the_few_bits() -> None:
    plain, few = (
        json.loads(succeed("export", "bundle", BASE, "--dry-run", "--json", *options))["base_bytes"]
        for options in ([], ["--quantise", "int8"])
    )
    assert few < plain


def test_a_folded_model_is_quantised_too(conv_adapters: dict[str, Adapter], tmp_path: Path) -> None:
    file, adapter = tmp_path / "model.onnx", tmp_path / "two.safetensors"
    adapter.write_bytes(conv_adapters["two"].to_bytes())
    succeed("export", "folded", BASE, adapter, "--out", file, "--quantise", "int8")
    assert "tpeft.quantised" in {entry.key for entry in onnx.load(file).metadata_props}


@pytest.mark.parametrize("option", ["--quantise", "--activations"])
def test_another_number_of_bits_is_a_usage_error(option: str, tmp_path: Path) -> None:
    assert "int3" in fail("export", "bundle", BASE, "--out", tmp_path / "b", option, "int3", code=2)
