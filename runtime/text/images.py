"""Images of prompts, read and prepared with Pillow and NumPy alone.

They are prepared as transformers' CLIPImageProcessor does, or as its processor of InternVL.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.image_facts import ImageFacts
from tpeft_deploy.errors import InputError, brief, requires
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.text.image_tiles import Grid, cut_image, grid_of
from tpeft_deploy.tucker import Array

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "ImageFile", "PromptImages", "expanded", "read_image", "with_images"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats that servers read."""

_MOST_PIXELS = 1 << 25
_MOST_RATIO = 100  # of the sides; images are resized by the shorter one
# Bytes of a pixel.
_DECODED = 12  # in the image's mode, as RGB, and turned
_RESIZED = 8
_PREPARED = 72  # in float64 and float32, with the results of a step
_KEPT = 12
_ORIENTATION = 0x0112  # of Exif
# Orientation -> names of Pillow's transpositions by which an image is upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageFile(NamedTuple):
    """Content of an image file, and what reads it, for messages: `read image cat.png`."""

    content: bytes
    doing: str = "read an image"


def with_images(request: GenerationRequest, bundle: Bundle, files: Sequence[ImageFile]) -> GenerationRequest:
    """A request with the images of some files, and a placeholder in its prompt for each of their features.

    Args:
        request: request; its prompt has a token in the place of each image, or all of them.
        bundle: bundle.
        files: image files.

    Raises:
        MissingExtra: Pillow is not installed.
        InputError: the bundle prepares no images, or a file is none.
    """
    if not files:
        return request
    images = PromptImages(bundle, f"read the images of a prompt for bundle {bundle.path}")
    prompt = request.prompt
    if sum(token == images.placeholder for token in prompt) == len(files):
        prompt = images.expanded(prompt, files)
    return replace(request, prompt=prompt, inputs=images.inputs(files))


class PromptImages:
    """Images of prompts, as a bundle takes them.

    Args:
        bundle: bundle.
        doing: purpose, for messages.
        formats: names of Pillow's formats that are read; None for all.

    Attributes:
        placeholder: token in the place of an image.
        each: number of features of an image.

    Raises:
        MissingExtra: Pillow is not installed.
        InputError: the bundle prepares no images.
    """

    def __init__(self, bundle: Bundle, doing: str, formats: Sequence[str] | None = None) -> None:
        self._doing, self._formats = doing, formats
        for part in bundle.components.values():
            ports, facts = part.manifest.decoder, ImageFacts.read(part)
            if ports is not None and ports.placeholder is not None and facts is not None:
                break
        else:
            raise InputError(
                doing,
                expected="a bundle for generation with images",
                got="one without, or without an image processor",
                fix="Export a directory of such a model that has preprocessor_config.json, with --generation.",
            )
        with requires("Pillow", "images", doing):
            import PIL.Image  # noqa: F401
        source = bundle.components[ports.source].manifest
        each = next(port.shape[1] for port in source.outputs if port.name == ports.source_outputs[0])
        self._facts = facts
        self._input = source.inputs[0]
        self.placeholder: int = ports.placeholder
        self.each: int = each if isinstance(each, int) else 1

    def expanded(self, tokens: Sequence[int], files: Sequence[ImageFile]) -> list[int]:
        """Tokens with a placeholder for each feature of an image, and the tokens around them.

        Args:
            tokens: tokens of a prompt, with a placeholder in the place of each image.
            files: image files; their headers are read if sizes decide on the number of features.

        Raises:
            InputError: there are more or fewer placeholders, or a file is no image.
        """
        places = sum(token == self.placeholder for token in tokens)
        if places != len(files):
            raise InputError(
                "generate text with images",
                expected=f"a chat template with a place for each of {len(files)} images",
                got=f"{places} image tokens in the prompt",
            )
        counts = [self.each * self._pieces(file) for file in files]
        return expanded(tokens, self.placeholder, counts, self._facts.before, self._facts.after)

    def memory(self, files: Sequence[ImageFile]) -> int:
        """Return the bytes of memory that reading some images takes; only their headers are read.

        Raises:
            InputError: a file is no image, or too large a one.
        """
        costs = [(0, 0)]
        for file in files:
            with _opened(file, self._formats) as image:
                costs.append(_memory(_upright(image), self._facts))
        return max(scratch for scratch, _ in costs) + 2 * sum(kept for _, kept in costs)

    def inputs(self, files: Sequence[ImageFile]) -> dict[str, Array]:
        """Return the input of the component that computes features: (pictures, channels, height, width).

        Raises:
            InputError: a file is no image, too large a one, or of another size where images are not resized.
        """
        pixels = [read_image(file, self._facts, self._formats) for file in files]
        shapes = {array.shape[1:] for array in pixels}
        if len(shapes) > 1:
            raise InputError(self._doing, expected="images of one size", got=", ".join(map(str, sorted(shapes))))
        return {self._input.name: np.concatenate(pixels).astype(self._input.dtype)}

    def _pieces(self, file: ImageFile) -> int:
        """Number of pictures that an image becomes."""
        if self._facts.tiles is None:
            return 1
        with _opened(file, self._formats) as image:
            return _grid(_upright(image), self._facts).pieces


def read_image(file: ImageFile, facts: ImageFacts, formats: Sequence[str] | None = None) -> Array:
    """Read an image, (pictures, channels, height, width) in float32; of an animation, the first frame.

    As transformers' `load_image` does, it is turned as the Exif orientation of a camera's picture says.

    Args:
        file: image file.
        facts: preparation.
        formats: names of Pillow's formats that are read; None for all.

    Raises:
        MissingExtra: Pillow is not installed.
        InputError: the file is no image, or too large a one.
    """
    with _opened(file, formats) as opened:
        try:
            turn = _TURNS.get(_orientation(opened))
            image = opened.convert("RGB")
        except Exception as error:  # formats raise every kind of exception
            raise InputError(file.doing, expected="an image file", got=brief(error, 120)) from error
    if turn is not None:
        from PIL import Image

        image = image.transpose(Image.Transpose[turn])
    if facts.tiles is not None:
        pieces = cut_image(image, _tile(facts), facts.tiles, facts.resample)
        return np.stack([_prepared(piece, facts) for piece in pieces])
    if facts.resize is not None:
        image = image.resize(_resized(image.size, facts.resize), facts.resample)
    return _prepared(image, facts)[None]


def expanded(
    tokens: Sequence[int],
    placeholder: int,
    counts: Sequence[int],
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> list[int]:
    """Tokens with a placeholder for each feature of an image, where they have one for each image.

    Args:
        tokens: tokens of a prompt, with a placeholder for each image.
        placeholder: token in the place of an image.
        counts: number of features of each image.
        before: tokens in front of the placeholders of an image.
        after: tokens behind them.
    """
    left = iter(counts)
    return [
        token
        for own in tokens
        for token in ([*before, *[placeholder] * next(left), *after] if own == placeholder else [own])
    ]


def _prepared(image: Image.Image, facts: ImageFacts) -> Array:
    """Values of a picture of the final size, or of the one that is cropped to it: (channels, height, width)."""
    array: Array = np.moveaxis(np.asarray(image), -1, 0)
    if facts.crop is not None:
        array = _cropped(array, facts.crop)
    pixels = array.astype(np.float64)
    if facts.scale is not None:
        pixels = pixels * facts.scale
    found: Array = pixels.astype(np.float32)
    for step, values in ((np.subtract, facts.mean), (np.divide, facts.std)):
        if values is not None:
            found = step(found, np.array(values, np.float32)[:, None, None])
    return np.ascontiguousarray(found)


def _opened(file: ImageFile, formats: Sequence[str] | None) -> Image.Image:
    """Image of which the header was read, and its size checked."""
    doing = file.doing
    with requires("Pillow", "images", doing):
        from PIL import Image, UnidentifiedImageError
    try:
        opened = Image.open(io.BytesIO(file.content), formats=None if formats is None else tuple(formats))
    except Exception as error:  # formats raise every kind of exception
        named = "an image file" + (f" ({', '.join(formats)})" if formats else "")
        got = "another file" if isinstance(error, UnidentifiedImageError) else brief(error, 120)
        raise InputError(doing, expected=named, got=got) from error
    width, height = opened.size
    if width * height > _MOST_PIXELS or max(opened.size) > _MOST_RATIO * min(opened.size):
        raise InputError(
            doing,
            expected=f"at most {_MOST_PIXELS:,} pixels, and a side at most {_MOST_RATIO} times the other",
            got=f"{width} x {height}",
        )
    return opened


def _orientation(image: Image.Image) -> int:
    """Exif orientation, from what precedes the pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode all pixels to look behind them
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Exif that cannot be read is none
        return 1


def _upright(image: Image.Image) -> tuple[int, int]:
    """Width and height of the image when it is upright."""
    width, height = image.size
    return (height, width) if _orientation(image) in range(5, 9) else (width, height)


def _memory(size: tuple[int, int], facts: ImageFacts) -> tuple[int, int]:
    """Bytes that reading an image takes for a while, and those of its pixel values."""
    if facts.tiles is not None:
        pieces, kept = _grid(size, facts).pieces, math.prod(_tile(facts))
        return _DECODED * math.prod(size) + (_RESIZED * pieces + _PREPARED) * kept, _KEPT * kept * pieces
    resized = size if facts.resize is None else _resized(size, facts.resize)
    cropped = resized if facts.crop is None else facts.crop
    scratch = _DECODED * math.prod(size) + _RESIZED * math.prod(resized) + _PREPARED * math.prod(cropped)
    return scratch, _KEPT * math.prod(cropped)


def _grid(size: tuple[int, int], facts: ImageFacts) -> Grid:
    return Grid(1, 1) if facts.tiles is None else grid_of(size, _tile(facts), facts.tiles)


def _tile(facts: ImageFacts) -> tuple[int, int]:
    """Height and width of a tile."""
    height, width = facts.resize or (1, 1)
    return height, width


def _resized(size: tuple[int, int], wanted: Sequence[int]) -> tuple[int, int]:
    """Width and height after resizing."""
    if len(wanted) > 1:
        return wanted[1], wanted[0]
    width, height = size
    long = int(wanted[0] * max(size) / min(size))
    return (wanted[0], long) if width <= height else (long, wanted[0])


def _cropped(array: Array, crop: tuple[int, int]) -> Array:
    """The middle of an image, with zeros where it is smaller."""
    for axis, wanted in enumerate(crop, 1):
        size: Any = array.shape[axis]
        short = max(wanted - size, 0)
        before = -(-short // 2)
        padding = [(0, 0)] * 3
        padding[axis] = (before, short - before)
        start = (size - wanted) // 2 + before
        array = np.pad(array, padding).take(range(start, start + wanted), axis)
    return array
