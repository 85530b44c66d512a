"""Images of prompts: read and prepared with Pillow and NumPy alone, as transformers' CLIPImageProcessor does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.image_facts import ImageFacts
from tpeft_deploy.errors import InputError, brief, requires
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.tucker import Array

__all__ = ["expanded", "read_image", "with_images"]


def with_images(request: GenerationRequest, bundle: Bundle, paths: Sequence[str]) -> GenerationRequest:
    """A request with the images of some files, and a placeholder in its prompt for each of their features.

    Args:
        request: request; its prompt has a token in the place of each image, or all of them.
        bundle: bundle.
        paths: image files.

    Raises:
        MissingExtra: Pillow is not installed.
        InputError: the bundle prepares no images, or a file is none.
    """
    if not paths:
        return request
    for part in bundle.components.values():
        ports, facts = part.manifest.decoder, ImageFacts.read(part)
        if ports is not None and ports.placeholder is not None and facts is not None:
            break
    else:
        raise InputError(
            f"read the images of a prompt for bundle {bundle.path}",
            expected="a bundle for generation with images",
            got="one without, or without an image processor",
            fix="Export a directory of such a model that has preprocessor_config.json, with --generation.",
        )
    source = bundle.components[ports.source].manifest
    each = next(port.shape[1] for port in source.outputs if port.name == ports.source_outputs[0])
    pixels = np.stack([read_image(Path(path), facts) for path in paths]).astype(source.inputs[0].dtype)
    prompt = expanded(request.prompt, ports.placeholder, len(paths), each if isinstance(each, int) else 1)
    return replace(request, prompt=prompt, inputs={source.inputs[0].name: pixels})


def read_image(path: Path, facts: ImageFacts) -> Array:
    """Read an image file, (channels, height, width) in float32.

    Raises:
        MissingExtra: Pillow is not installed.
        InputError: the file is no image.
    """
    with requires("Pillow", "images", f"read image {path}"):
        from PIL import Image
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # formats raise every kind of exception
        raise InputError(f"read image {path}", expected="an image file", got=brief(error, 120)) from error
    if facts.resize is not None:
        image = image.resize(_resized(image.size, facts.resize), facts.resample)
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


def expanded(tokens: Sequence[int], placeholder: int, images: int, each: int) -> list[int]:
    """Tokens with a placeholder for each feature of an image, where they have one for each image.

    Args:
        tokens: tokens of a prompt.
        placeholder: token in the place of an image.
        images: number of images.
        each: number of features of an image.
    """
    if sum(token == placeholder for token in tokens) != images:
        return list(tokens)
    return [token for own in tokens for token in [own] * (each if own == placeholder else 1)]


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
