"""Models of images and text in slot form: embeddings of images in the place of placeholder tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.component import Component
from tpeft_deploy.exporters.bases.slot_decoder import (
    SlotDecoder,
    comparing,
    mixed_in,
    past_of,
    slot_caches,
    slot_inputs,
    slot_ports,
    slot_sizes,
)
from tpeft_deploy.exporters.oracle.decoder_runs import CHUNK, ROWS

__all__ = ["ImageDecoder", "image_decoder"]

FEATURES = "features"
_AROUND = 2  # tokens of text before and behind the image that the slot form is compared on


class ImageDecoder(SlotDecoder):
    """Mixin that `image_decoder` puts before a model's class: the forward method of `SlotDecoder`, with features."""

    def forward(  # type: ignore[override]  # one input more
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        seqlens: torch.Tensor,
        past_key_values: Mapping[str, torch.Tensor] | None = None,
        **flat: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Logits and caches as `SlotDecoder` returns them.

        Args:
            input_ids: new tokens, (rows, chunk).
            features: embeddings that take the place of those of the placeholder tokens, (rows, chunk, width); zeros
                for tokens without.
            seqlens, past_key_values, flat: as for `SlotDecoder`.
        """
        model: Any = self
        embeddings = model.get_input_embeddings()(input_ids)
        # A placeholder that was generated has no features, and the embedding that the model's forward method gives it.
        placed = (input_ids == model.config.image_token_id)[..., None] & (features.abs().amax(-1, keepdim=True) > 0)
        embeddings = torch.where(placed, features, embeddings)
        return self.in_slots(input_ids, seqlens, past_key_values or flat, inputs_embeds=embeddings)


def image_decoder(model: Any, vision: Component, source: str, directory: Path | None = None) -> Component:
    """Make the component in slot form that reads tokens and features of images.

    Args:
        model: a model of transformers with `image_token_id` in its config, of images and text.
        vision: component with the features of images, (images, tokens, width).
        source: name of that component.
        directory: directory of the model.

    Raises:
        UnsupportedBase: the slot form does not compute what the model's forward method does.
    """
    doing = f"load base {directory or type(model).__name__} for generation"
    sizes, placeholder = slot_sizes(doing, model), model.config.image_token_id
    if not 0 <= placeholder < sizes.vocabulary:
        raise UnsupportedBase(doing, expected=f"an image token below {sizes.vocabulary}", got=placeholder)
    with comparing(doing, model) as check:
        pixels = {name: images[:1] for name, images in vision.example_inputs.items()}
        module: Any = vision.base(source).module
        [(output, found)] = module(**pixels).items()
        features = found[0]
        check(_slot_logits(model, features, sizes.caches), _own_logits(model, pixels, len(features)))
    inputs, axes = slot_inputs(sizes, features.dtype)
    inputs["input_ids"][0, 1:] = inputs["input_ids"][1, 0] = placeholder
    shape = (*inputs["input_ids"].shape, features.shape[-1])
    random = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(features.dtype)
    inputs = {"input_ids": inputs.pop("input_ids"), FEATURES: random, **inputs}
    ports = replace(
        slot_ports(sizes), features=FEATURES, placeholder=placeholder, source=source, source_outputs=(output,)
    )
    axes |= {FEATURES: {0: ROWS, 1: CHUNK}}
    in_order = {name: axes[name] for name in inputs}  # the exporter names axes by position
    return Component(mixed_in(model, ImageDecoder), inputs, in_order, decoder=ports, directory=directory)


def _prompt(model: Any, count: int) -> torch.Tensor:
    """Tokens with one image in the middle, (1, tokens)."""
    placeholder = model.config.image_token_id
    text = [token for token in range(2 * _AROUND + 1) if token != placeholder]
    return torch.tensor([[*text[:_AROUND], *[placeholder] * count, *text[_AROUND : 2 * _AROUND]]])


def _own_logits(model: Any, pixels: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Logits behind an image by the model's forward method."""
    logits: torch.Tensor = model(input_ids=_prompt(model, count), **pixels).logits[:, -1]
    return logits


def _slot_logits(model: Any, features: torch.Tensor, shapes: Any) -> torch.Tensor:
    """The same in slot form, in two pieces that divide the image, and one token."""
    tokens = _prompt(model, len(features))
    length = tokens.shape[1]
    whole = torch.zeros(1, length, features.shape[-1], dtype=features.dtype)
    whole[0, _AROUND : _AROUND + len(features)] = features
    mixed, caches = mixed_in(model, ImageDecoder), slot_caches(shapes, 1, length, features.dtype)
    middle = _AROUND + len(features) // 2
    for start, end in ((0, middle), (middle, length - 1), (length - 1, length)):
        found = mixed(tokens[:, start:end], whole[:, start:end], torch.tensor([start]), **caches)
        caches = past_of(found)
    logits: torch.Tensor = found["logits"]
    return logits
