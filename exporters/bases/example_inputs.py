"""Example inputs of a transformers model, made of the sizes in its config.

A model here is of a class that is known only once transformers is imported, hence `Any`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases import dotted_names
from tpeft_deploy.exporters.bases.kv_cache_inputs import cache_parameter, with_cache
from tpeft_deploy.exporters.causes import said_by
from tpeft_deploy.formats.base.model import FACTORY

__all__ = ["FACTORY", "Tensors", "cached_text", "images", "parameters", "run", "text", "text_padding"]

Tensors = dict[str, torch.Tensor]

BATCH, SEQUENCE, CACHED = 2, 7, 4  # all different and none of them 1, which the exporter takes for a constant


def parameters(model: type[nn.Module]) -> list[str]:
    """Parameters of a class's forward method, by name."""
    return [name for name in inspect.signature(model.forward).parameters if name != "self"]


def run(model: nn.Module, inputs: Tensors, doing: str) -> None:
    """Run a model once on its example inputs.

    Raises:
        UnsupportedBase: it does not run; `doing` begins the message.
    """
    try:
        with torch.no_grad():
            model(**dotted_names.nest(inputs))
    except Exception as error:  # models raise every kind of exception; the cause is kept
        sizes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs.values())
        raise UnsupportedBase(
            doing,
            problem=f"the model does not run on inputs of shapes {sizes} ({said_by(error)})",
            fix=FACTORY,
        ) from error


def _ids(model: Any, length: int, doing: str) -> torch.Tensor:
    size = getattr(model.config, "vocab_size", None)
    if not isinstance(size, int):
        raise UnsupportedBase(doing, expected="vocab_size in config.json", got=repr(size), fix=FACTORY)
    return torch.randint(0, size, (BATCH, length), generator=torch.Generator().manual_seed(0))


def text(model: Any, doing: str) -> tuple[Tensors, dict[str, Any]]:
    """Example inputs and dynamic shapes of a text model: all (batch, sequence)."""
    inputs = {
        "input_ids": _ids(model, SEQUENCE, doing),
        "attention_mask": torch.ones(BATCH, SEQUENCE, dtype=torch.int64),
    }
    if "token_type_ids" in parameters(type(model)) and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (torch.arange(SEQUENCE) >= SEQUENCE // 2).long().expand(BATCH, -1).clone()
    return inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}


def text_padding(model: Any) -> dict[str, int]:
    """Padding values of the inputs of `text`: the config's padding token, hidden by a mask of 0."""
    token = getattr(model.config, "pad_token_id", None)
    if not isinstance(token, int) or not 0 <= token < model.config.vocab_size:
        token = 0
    return {"input_ids": token, "attention_mask": 0, "token_type_ids": 0}


def cached_text(model: Any, doing: str) -> tuple[Tensors, dict[str, Any]]:
    """Those of a causal model, which becomes a `CachedDecoder`.

    Raises:
        UnsupportedBase: it remembers past tokens in another way than by keys and values.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if cache_parameter(type(model).forward) is None or not kinds <= {"full_attention", "sliding_attention"}:
        raise UnsupportedBase(
            doing,
            expected="a causal language model with layers that keep keys and values of past tokens",
            got=f"{type(model).__name__} with layers {', '.join(sorted(kinds))}",
            fix=FACTORY,
        )
    try:
        inputs = with_cache(model, _ids(model, CACHED + SEQUENCE, doing), CACHED)
    except Exception as error:  # as above
        raise UnsupportedBase(
            doing,
            problem=f"the model does not run with a cache of keys and values ({said_by(error)})",
            fix=FACTORY,
        ) from error
    shapes: dict[str, Any] = {name: {0: "batch", 2: "past"} for name in inputs}
    shapes["input_ids"] = {0: "batch", 1: "sequence"}
    shapes["attention_mask"] = {0: "batch", 1: "past + sequence"}
    return inputs, shapes


def images(model: Any, doing: str) -> tuple[Tensors, dict[str, Any]]:
    """Pixels of another size than the config's if the model takes them: at that size it may skip what others need."""
    own = _pair(getattr(model.config, "image_size", None))
    other = _other_size(model.config, own)
    pixels = {"pixel_values": _pixels(model, other)}
    if _takes(model, pixels):
        return pixels, {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    if own is None:
        run(model, pixels, doing)
        own = other
    return {"pixel_values": _pixels(model, own)}, {"pixel_values": {0: "batch"}}


def _takes(model: nn.Module, pixels: Tensors) -> bool:
    """Whether a model runs at a size: those with a fixed grid of positions raise where it does not fit."""
    try:
        with torch.no_grad():
            model(**pixels)
    except (ValueError, RuntimeError, AssertionError):
        return False
    return True


def _pixels(model: Any, size: tuple[int, int]) -> torch.Tensor:
    shape = (BATCH, getattr(model.config, "num_channels", 3), *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _other_size(config: Any, own: tuple[int, int] | None) -> tuple[int, int]:
    """A height and a width that differ from each other and the config's, with no stage smaller than 2x2 in between.

    A model in stages shrinks its images 32 times; one of patches, not at all afterwards.
    """
    patch = _pair(getattr(config, "patch_size", None))
    if patch is None or hasattr(config, "depths") or hasattr(config, "hidden_sizes"):
        patch = (32, 32)
    grids = ((3, 4), (5, 6), (7, 8)) if patch == (32, 32) else ((6, 5), (8, 7), (10, 9))
    sizes = [(rows * patch[0], columns * patch[1]) for rows, columns in grids]
    return next(size for size in sizes if own is None or not {*size} & {*own})
