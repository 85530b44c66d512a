"""Bases from directories of diffusers: the model, and example inputs made of the sizes in its config.

A model here is of a class that is known only once diffusers is imported, hence `Any`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.example_inputs import FACTORY, Tensors, run
from tpeft_deploy.formats.base.diffusers_model import load_diffusers

__all__ = ["load_directory"]

Examples = tuple[Tensors, dict[str, Any]]

BATCH, SEQUENCE = 2, 5  # both differ from all other sizes, and neither is 1, which the exporter takes for a constant
_IMAGE = {0: "batch", 2: "height", 3: "width"}
_TEXT = {0: "batch", 1: "sequence"}
_ROWS = {0: "batch"}
_STEPS = (700.0, 30.0)  # the noise level of each row: rows of one batch may be at different steps
_TIME_IDS = 6  # original size, crop and target size, two numbers each
_REFINER = (5, 1280)  # time ids and size of the text embedding of SDXL's refiner: a score in place of the target size


def load_directory(path: str | os.PathLike[str]) -> tuple[nn.Module, Tensors, dict[str, Any], dict[str, int]]:
    """A model in evaluation mode with example inputs and dynamic shapes, from a directory of diffusers.

    Every input has the batch as its first axis, the timestep too, but for the positions of Flux (`img_ids`,
    `txt_ids`).  Height, width and the numbers of text and image tokens are dynamic.  Dicts that a model takes become
    one input per entry, `added_cond_kwargs.text_embeds`.

    Args:
        path: holds config.json and diffusion_pytorch_model.safetensors, or its shards and their index.

    Returns:
        Module, example inputs by name, dynamic shapes by input name, and no padding.

    Raises:
        MissingExtra: diffusers is not installed.
        UnsupportedBase: a pipeline, an incomplete directory, or a class without example inputs here.
    """
    model = load_diffusers(path)
    doing, name = f"load base {path}", type(model).__name__
    examples = _EXAMPLES.get(name)
    if examples is None:
        raise UnsupportedBase(doing, expected=f"one of {', '.join(sorted(_EXAMPLES))}", got=name, fix=FACTORY)
    inputs, shapes = examples(model.config, _Random(model.dtype), doing)
    run(model, inputs, doing)
    return model, inputs, shapes, {}


class _Random:
    """Reproducible example values in the dtype of a model."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, below, shape, generator=self._generator)


def _unet(config: Any, random: _Random, doing: str) -> Examples:
    inputs = {"sample": _pixels(config, random), "timestep": torch.tensor(_STEPS)}
    shapes: dict[str, Any] = {"sample": _IMAGE, "timestep": _ROWS}
    if config.get("num_class_embeds") and config.get("class_embed_type") is None:
        inputs["class_labels"], shapes["class_labels"] = random.integers(config.num_class_embeds, BATCH), _ROWS
    return inputs, shapes


def _conditioned_unet(config: Any, random: _Random, doing: str) -> Examples:
    inputs, shapes = _unet(config, random, doing)
    size = config.get("encoder_hid_dim") or config.cross_attention_dim
    inputs["encoder_hidden_states"] = random(BATCH, SEQUENCE, size if isinstance(size, int) else size[0])
    shapes["encoder_hidden_states"] = _TEXT
    kind = config.get("addition_embed_type")
    if kind == "text_time":
        total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        count = _REFINER[0] if total - _REFINER[0] * each == _REFINER[1] else _TIME_IDS
        inputs["added_cond_kwargs.text_embeds"] = random(BATCH, total - count * each)
        inputs["added_cond_kwargs.time_ids"] = random.integers(1024, BATCH, count).to(random.dtype)
        shapes |= {"added_cond_kwargs.text_embeds": _ROWS, "added_cond_kwargs.time_ids": _ROWS}
    elif kind not in (None, "text"):
        raise UnsupportedBase(
            doing, expected="addition_embed_type 'text_time', 'text' or none", got=repr(kind), fix=FACTORY
        )
    return inputs, shapes


def _autoencoder(config: Any, random: _Random, doing: str) -> Examples:
    return {"sample": _pixels(config, random)}, {"sample": _IMAGE}


def _stable_diffusion_3(config: Any, random: _Random, doing: str) -> Examples:
    inputs = {
        "hidden_states": _grid(config.in_channels, 2 * config.patch_size, random),
        "encoder_hidden_states": random(BATCH, SEQUENCE, config.joint_attention_dim),
        "pooled_projections": random(BATCH, config.pooled_projection_dim),
        "timestep": torch.tensor(_STEPS),
    }
    return inputs, {
        "hidden_states": _IMAGE,
        "encoder_hidden_states": _TEXT,
        "pooled_projections": _ROWS,
        "timestep": _ROWS,
    }


def _flux(config: Any, random: _Random, doing: str) -> Examples:
    rows, columns = 2, 3
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    inputs = {
        "hidden_states": random(BATCH, rows * columns, config.in_channels),
        "encoder_hidden_states": random(BATCH, SEQUENCE, config.joint_attention_dim),
        "pooled_projections": random(BATCH, config.pooled_projection_dim),
        "timestep": (torch.tensor(_STEPS) / 1000).to(random.dtype),  # the model itself multiplies it by 1000
        "img_ids": positions,
        "txt_ids": torch.zeros(SEQUENCE, 3),
    }
    shapes: dict[str, Any] = {
        "hidden_states": {0: "batch", 1: "image"},
        "encoder_hidden_states": _TEXT,
        "pooled_projections": _ROWS,
        "timestep": _ROWS,
        "img_ids": {0: "image"},
        "txt_ids": {0: "sequence"},
    }
    if config.guidance_embeds:
        inputs["guidance"], shapes["guidance"] = torch.tensor([3.5, 4.0]).to(random.dtype), _ROWS
    return inputs, shapes


def _pixels(config: Any, random: _Random) -> torch.Tensor:
    """An image of 2 and 3 pixels where the model has halved it as often as it does."""
    return _grid(config.in_channels, 2 ** len(config.block_out_channels), random)


def _grid(channels: int, size: int, random: _Random) -> torch.Tensor:
    return random(BATCH, channels, 2 * size, 3 * size)


_EXAMPLES: dict[str, Callable[[Any, _Random, str], Examples]] = {
    "AutoencoderKL": _autoencoder,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _stable_diffusion_3,
    "UNet2DConditionModel": _conditioned_unet,
    "UNet2DModel": _unet,
}
