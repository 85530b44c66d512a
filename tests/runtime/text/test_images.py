"""Images as transformers' CLIPImageProcessor prepares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from tpeft_deploy.bundle.image_facts import ImageFacts
from tpeft_deploy.errors import InputError
from tpeft_deploy.exporters.bases.generation.image_processor import read_image as facts_of
from tpeft_deploy.runtime.text.images import ImageFile, _upright, expanded, read_image

SQUARE = {"size": {"height": 12, "width": 18}, "do_center_crop": False, "resample": 2}
PLAIN = {"do_resize": False, "do_normalize": False, "crop_size": {"height": 33, "width": 14}}


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("options", [{"size": 24, "crop_size": 16}, SQUARE, PLAIN])
def test_pixels_are_those_of_the_image_processor(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    processor = transformers.CLIPImageProcessorPil(**options)
    processor.save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    assert facts is not None
    random = np.random.default_rng(0)
    for height, width in ((40, 25), (20, 71), (9, 9)):
        image = Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).convert(mode)
        image.save(tmp_path / "image.png")
        expected = processor(Image.open(tmp_path / "image.png"))["pixel_values"][0]
        [found] = read_image(ImageFile((tmp_path / "image.png").read_bytes()), facts)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(10), 60000])
def test_a_picture_is_turned_as_transformers_loads_it(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw = np.random.default_rng(orientation)
    image = Image.fromarray(draw.integers(0, 256, (8, 24, 3), np.uint8))
    image.save(tmp_path / "picture", kind, exif=exif)
    content = (tmp_path / "picture").read_bytes()
    facts = ImageFacts(resize=None, resample=3, crop=None, scale=None, mean=None, std=None)
    wanted = np.asarray(load_image(str(tmp_path / "picture")), np.float32)
    np.testing.assert_array_equal(read_image(ImageFile(content), facts)[0], np.moveaxis(wanted, -1, 0))
    with Image.open(tmp_path / "picture") as opened:
        assert _upright(opened) == wanted.shape[1::-1]


def test_another_image_processor_gives_no_facts(tmp_path: Path) -> None:
    assert facts_of(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "LlavaNextImageProcessor"}')
    assert facts_of(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", b"<svg/>"])
def test_a_file_that_is_no_image_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    assert facts is not None
    with pytest.raises(InputError, match="expected an image file") as error:
        read_image(ImageFile(content), facts)
    assert "\n" not in str(error.value)


def test_a_placeholder_stands_for_every_feature_of_its_image() -> None:
    assert expanded([1, 9, 2, 9], 9, [3, 2]) == [1, 9, 9, 9, 2, 9, 9]
    assert expanded([1, 9, 2], 9, [2], [7], [8]) == [1, 7, 9, 9, 8, 2]
