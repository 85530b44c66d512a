"""Image processors that a bundle records, and what InternVL's processor sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.exporters.small_internvl import END, PREPARED, SIDE, START, processor
from tpeft_deploy.exporters.bases.generation.image_processor import read_image


def test_internvl_cuts_images_into_tiles_whatever_its_image_processor_says(tmp_path: Path) -> None:
    own = processor(crop_to_patches=False)
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "internvl"}')
    facts = read_image(tmp_path)
    assert facts is not None
    assert (facts.resize, facts.tiles) == ((SIDE, SIDE), (1, PREPARED["max_patches"]))
    assert (facts.before, facts.after) == ((START,), (END,))
    assert facts.crop is None


def test_internvl_without_tiles_keeps_one_picture(tmp_path: Path) -> None:
    processor(max_patches=1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "internvl"}')
    facts = read_image(tmp_path)
    assert facts is not None
    assert facts.tiles is None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("model", "no CLIPImageProcessor, got GotOcr2ImageProcessor"),
        ("processor", "no GotOcr2ImageProcessor, got CLIPImageProcessor"),
        ("tokenizer", "the tokenizer names no tokens around an image"),
        ("size", "tiles have no height and width"),
    ],
)
def test_another_directory_gives_no_facts_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: str, told: str
) -> None:
    processor().save_pretrained(tmp_path)
    kind = "llava" if spoil == "model" else "internvl"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    if spoil in {"processor", "size"}:
        file = tmp_path / "processor_config.json"
        document = json.loads(file.read_text())
        changes = {"image_processor_type": "CLIPImageProcessor"}
        document["image_processor"] |= changes if spoil == "processor" else {"size": {"shortest_edge": SIDE}}
        file.write_text(json.dumps(document))
    if spoil == "tokenizer":
        file = tmp_path / "tokenizer_config.json"
        kept = {name: value for name, value in json.loads(file.read_text()).items() if "image_token" not in name}
        file.write_text(json.dumps({name: value for name, value in kept.items() if "special" not in name}))
    assert read_image(tmp_path) is None
    assert told in caplog.text
