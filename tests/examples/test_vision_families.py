"""The examples of vision models, small: each compares its rows with merged models and fails if one differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.families import convnext, internvl

pytestmark = pytest.mark.families


def test_convnext_has_three_heads_in_one_batch_and_maps_at_four_strides(tmp_path: Path) -> None:
    figures = convnext.run(tmp_path, full=False)
    assert figures["error of a mixed batch"] <= 1e-5
    assert max(figures["errors at export"].values()) <= 1e-5
    assert {row["form"] for row in figures["latency"]} >= {"plain", "folded", "factored", "banked", "mixed"}


def test_internvl_is_adapted_in_vision_and_in_language(tmp_path: Path) -> None:
    figures = internvl.run(tmp_path, full=False)
    assert figures["components, small"] == "vision, embedding, language"
    assert figures["error of a mixed batch"] <= 1e-5
    assert figures["error of images and text together"] <= 1e-5
