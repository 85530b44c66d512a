"""Image processor of a Hugging Face model directory: how a bundle's runtime prepares the images of prompts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpeft_deploy.bundle.image_facts import ImageFacts
from tpeft_deploy.exporters.bases.model_text import load_tokenizer
from tpeft_deploy.formats.read.saved import read_config

__all__ = ["read_image"]

_log = logging.getLogger("tpeft_deploy.exporters")

_CLIP, _TILED = "CLIPImageProcessor", "GotOcr2ImageProcessor"
_KIND = "image_processor_type"


def read_image(directory: Path) -> ImageFacts | None:
    """Preparation of images by the directory's image processor; None, with a warning, where it cannot be recorded.

    That of CLIPImageProcessor, and that of GotOcr2ImageProcessor as InternVL's processor calls it, are known.
    """
    try:
        values, _ = _class(_CLIP).get_image_processor_dict(str(directory), local_files_only=True)
    except OSError:
        values = {}
    kind = str(values.get(_KIND, ""))
    config = directory / "config.json"
    tiled = config.is_file() and read_config(config).get("model_type") == "internvl"
    if not kind.startswith(_TILED if tiled else _CLIP) or values.get("do_pad"):
        wanted = _TILED if tiled else _CLIP
        _log.warning("%s: images are not read from files: no %s, got %s", directory, wanted, kind or "none")
        return None
    return _of_internvl(directory, values) if tiled else _facts(_processor(_CLIP, values))


def _class(name: str) -> Any:
    """Class of an image processor that works with Pillow."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _processor(name: str, values: dict[str, Any]) -> Any:
    return _class(name)(**{name: value for name, value in values.items() if name != _KIND})


def _facts(found: Any) -> ImageFacts:
    crop = _sizes(found.crop_size) if getattr(found, "do_center_crop", None) else ()
    return ImageFacts(
        resize=_sizes(found.size) if found.do_resize else None,
        resample=int(found.resample),
        crop=(crop[0], crop[-1]) if crop else None,
        scale=float(found.rescale_factor) if found.do_rescale else None,
        mean=tuple(map(float, found.image_mean)) if found.do_normalize else None,
        std=tuple(map(float, found.image_std)) if found.do_normalize else None,
    )


def _of_internvl(directory: Path, values: dict[str, Any]) -> ImageFacts | None:
    """Preparation by InternVL's processor, which sets values of its image processor and writes tokens around images."""
    found = _processor(_TILED, values | _set_by_internvl())
    tokenizer = load_tokenizer(directory)
    around: list[Any] = [getattr(tokenizer, name, None) for name in ("start_image_token_id", "end_image_token_id")]
    if None in around:
        _log.warning("%s: images are not read from files: the tokenizer names no tokens around an image", directory)
        return None
    facts = replace(_facts(found), before=(int(around[0]),), after=(int(around[1]),))
    if not found.crop_to_patches or found.max_patches <= 1:
        return facts
    size = _sizes(found.size)
    if len(size) == 1:
        _log.warning("%s: images are not read from files: tiles have no height and width", directory)
        return None
    return replace(facts, resize=size, tiles=(int(found.min_patches), int(found.max_patches)))


def _set_by_internvl() -> dict[str, Any]:
    """Values that InternVL's processor calls its image processor with."""
    from transformers.models.internvl import processing_internvl as own

    values = getattr(own.InternVLProcessor, "images_kwargs", None)
    if values is None:  # older versions of transformers
        values = own.InternVLProcessorKwargs._defaults.get("images_kwargs", {})
    return dict(values)


def _sizes(size: Any) -> tuple[int, ...]:
    """Sizes as `ImageFacts` has them."""
    values = dict(size)
    short = values.get("shortest_edge")
    return (int(short),) if short else (int(values["height"]), int(values["width"]))
