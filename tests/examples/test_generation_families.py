"""The examples of families that generate, small: each compares its rows with merged models and fails if one differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.families import llava, whisper

pytestmark = [
    pytest.mark.families,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]


def test_llava(tmp_path: Path) -> None:
    figures = llava.run(tmp_path, full=False)
    assert figures["components"] == "vision, language"
    assert figures["images of the rows"] == "2, 1, 0"
    assert max(figures["errors at export"].values()) <= 1e-5
    assert (
        figures["largest difference of log-probabilities"] <= 1e-4 < figures["smallest lead of a token over the next"]
    )


def test_whisper(tmp_path: Path) -> None:
    figures = whisper.run(tmp_path, full=False)
    assert figures["components"] == "encoder, decoder"
    assert max(figures["errors at export"].values()) <= 1e-5
    assert (
        figures["largest difference of log-probabilities"] <= 1e-4 < figures["smallest lead of a token over the next"]
    )
