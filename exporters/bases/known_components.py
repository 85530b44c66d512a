"""Components of models in Hugging Face directories: encoder-decoder, vision-language, two-tower and mask models.

Every component is the whole model with a forward that runs a part, so that names are those of the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.component import Component
from tpeft_deploy.exporters.bases.example_inputs import BATCH, SEQUENCE, Tensors
from tpeft_deploy.exporters.bases.generation.encoder_decoder import encoder_decoder
from tpeft_deploy.exporters.bases.generation.image_decoder import image_decoder
from tpeft_deploy.formats.base.diffusers_model import is_diffusers
from tpeft_deploy.formats.base.model import architecture, load_model, model_class
from tpeft_deploy.formats.read.saved import read_config

__all__ = ["known_components"]

Outputs = dict[str, torch.Tensor]
_TEXT = {0: "batch", 1: "sequence"}
_PROMPTS = {0: "batch", 1: "masks", 2: "points"}
_TARGET = 5  # tokens of a decoder's example, another number than SEQUENCE
_POINTS = (3, 4)  # masks of an image and points of a mask in an example


def known_components(path: str | os.PathLike[str], generation: bool = False) -> dict[str, Component] | None:
    """Components of a Hugging Face model directory; None for one that is exported as a single graph, and other bases.

    Args:
        path: the directory.
        generation: whether the decoder is in slot form.

    Raises:
        MissingExtra: transformers is not installed.
        UnsupportedBase: the directory cannot be loaded, its images have any size, or it has no decoder with a slot
            form.
    """
    place = Path(path)
    if not (place / "config.json").is_file() or is_diffusers(place):
        return None
    name = architecture(place)
    make = _MODELS.get(name)
    if make is None:
        return None
    if generation and make is _two_towers:
        raise UnsupportedBase(f"load base {place} for generation", expected="a model with a decoder", got=name)
    tower = (read_config(place / "config.json").get("vision_config") or {}).get("model_type")
    if tower == "pixtral":
        raise UnsupportedBase(
            f"load base {place}",
            expected="a vision tower of images of one size",
            got=f"{tower}, whose number of features follows the size of each image",
            fix="Export the language model alone.",
        )
    model = load_model(place, model_class(place, name))
    model.config.return_dict = True
    if generation:
        return _for_generation(model, place)
    return make(model)


def _for_generation(model: Any, place: Path) -> dict[str, Component]:
    """Components with a decoder in slot form."""
    if not hasattr(model.config, "vision_config"):
        return encoder_decoder(model, *_source(model), place)
    vision = Component(model, _pixels(model), forward=_see)
    return {"vision": vision, "language": image_decoder(model, vision, "vision", place)}


def _source(model: Any) -> tuple[Tensors, dict[str, Any]]:
    """Example inputs and dynamic shapes of an encoder."""
    if model.main_input_name == "input_features":
        frames = model.config.max_source_positions * 2
        return {"input_features": _randn(model, model.config.num_mel_bins, frames)}, {"input_features": {0: "batch"}}
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    inputs = {"input_ids": _ids(model.config.vocab_size, SEQUENCE), "attention_mask": mask}
    return inputs, dict.fromkeys(inputs, _TEXT)


def _encoder_decoder(model: Any) -> dict[str, Component]:
    inputs, shapes = _source(model)
    mask = {name: tensor for name, tensor in inputs.items() if name == "attention_mask"}
    with torch.no_grad():
        states = _encode(model, **inputs)["last_hidden_state"]
    given = {"decoder_input_ids": _ids(model.config.vocab_size, _TARGET), "encoder_hidden_states": states, **mask}
    axes = dict.fromkeys(given, _TEXT) | {"decoder_input_ids": {0: "batch", 1: "target"}}
    axes |= {"encoder_hidden_states": {0: "batch"} if not mask else _TEXT}
    return {
        "encoder": Component(model, inputs, shapes, forward=_encode_sound if not mask else _encode),
        "decoder": Component(model, given, axes, forward=_decode_sound if not mask else _decode),
    }


def _encode(model: Any, input_ids: Any = None, attention_mask: Any = None, **sound: Any) -> Outputs:
    given = sound or {"input_ids": input_ids, "attention_mask": attention_mask}
    return {"last_hidden_state": model.get_encoder()(**given, return_dict=True).last_hidden_state}


def _encode_sound(model: Any, input_features: Any) -> Outputs:
    return _encode(model, input_features=input_features)


def _decode(model: Any, decoder_input_ids: Any, encoder_hidden_states: Any, attention_mask: Any = None) -> Outputs:
    from transformers.modeling_outputs import BaseModelOutput

    found = model.forward_of_whole(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        use_cache=False,
        return_dict=True,
    )
    return {"logits": found.logits}


def _decode_sound(model: Any, decoder_input_ids: Any, encoder_hidden_states: Any) -> Outputs:
    return _decode(model, decoder_input_ids, encoder_hidden_states)


def _two_towers(model: Any) -> dict[str, Component]:
    vision, text = model.config.vision_config, model.config.text_config
    pixels = {"pixel_values": _randn(model, vision.num_channels, vision.image_size, vision.image_size)}
    ids = {
        "input_ids": _ids(text.vocab_size, SEQUENCE),
        "attention_mask": torch.ones(BATCH, SEQUENCE, dtype=torch.int64),
    }
    return {
        "image": Component(model, pixels, forward=_embed_image),
        "text": Component(model, ids, dict.fromkeys(ids, _TEXT), forward=_embed_text),
    }


def _embed_image(model: Any, pixel_values: Any) -> Outputs:
    pooled = model.vision_model(pixel_values=pixel_values, return_dict=True).pooler_output
    return {"image_embeds": model.visual_projection(pooled)}


def _embed_text(model: Any, input_ids: Any, attention_mask: Any) -> Outputs:
    found = model.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
    return {"text_embeds": model.text_projection(found.pooler_output)}


def _vision_language(model: Any) -> dict[str, Component]:
    text = model.config.text_config
    embeddings = {
        "inputs_embeds": _randn(model, SEQUENCE, text.hidden_size),
        "attention_mask": torch.ones(BATCH, SEQUENCE, dtype=torch.int64),
    }
    return {
        "vision": Component(model, _pixels(model), forward=_see),
        "embedding": Component(
            model, {"input_ids": _ids(text.vocab_size, SEQUENCE)}, {"input_ids": _TEXT}, forward=_embed
        ),
        "language": Component(model, embeddings, dict.fromkeys(embeddings, _TEXT), forward=_speak),
    }


def _pixels(model: Any) -> Tensors:
    """Example images."""
    vision = model.config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": _randn(model, vision.num_channels, height, width)}


def _see(model: Any, pixel_values: Any) -> Outputs:
    inner, config = model.model, model.config
    if hasattr(config, "downsample_ratio"):  # InternVL's pixels are shuffled before the projector
        return {"image_features": inner.get_image_features(pixel_values, return_dict=True).pooler_output}
    found = inner.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [found[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [states[:, 1:] for states in chosen]
    return {"image_features": inner.multi_modal_projector(torch.cat(chosen, dim=-1))}


def _embed(model: Any, input_ids: Any) -> Outputs:
    return {"inputs_embeds": model.get_input_embeddings()(input_ids)}


def _speak(model: Any, inputs_embeds: Any, attention_mask: Any) -> Outputs:
    found = model.model.language_model(
        inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, return_dict=True
    )
    return {"logits": model.lm_head(found.last_hidden_state)}


def _masks(model: Any) -> dict[str, Component]:
    vision, prompt = model.config.vision_config, model.config.prompt_encoder_config
    pixels = {"pixel_values": _randn(model, vision.num_channels, vision.image_size, vision.image_size)}
    size = prompt.image_embedding_size
    points = torch.rand((BATCH, *_POINTS, 2), generator=torch.Generator().manual_seed(0)) * vision.image_size
    prompts = {
        "image_embeddings": _randn(model, prompt.hidden_size, size, size),
        "input_points": points.to(model.dtype),
        "input_labels": torch.arange(BATCH * _POINTS[0] * _POINTS[1]).reshape(BATCH, *_POINTS) % 2,
    }
    axes = dict.fromkeys(prompts, _PROMPTS) | {"image_embeddings": {0: "batch"}}
    return {
        "image": Component(model, pixels, forward=_embed_pixels),
        "mask": Component(model, prompts, axes, forward=_mask),
    }


def _embed_pixels(model: Any, pixel_values: Any) -> Outputs:
    return {"image_embeddings": model.vision_encoder(pixel_values, return_dict=True).last_hidden_state}


def _mask(model: Any, image_embeddings: Any, input_points: Any, input_labels: Any) -> Outputs:
    # Every mask is a row: the model repeats images by the number of masks, which an export freezes.
    images, masks = input_labels.shape[:2]
    repeated = image_embeddings[:, None].expand(-1, masks, -1, -1, -1).flatten(0, 1)
    found = model.forward_of_whole(
        image_embeddings=repeated,
        input_points=input_points.flatten(0, 1)[:, None],
        input_labels=input_labels.flatten(0, 1)[:, None],
        return_dict=True,
    )
    return {
        "pred_masks": found.pred_masks[:, 0].unflatten(0, (images, masks)),
        "iou_scores": found.iou_scores[:, 0].unflatten(0, (images, masks)),
    }


def _ids(size: int, length: int) -> torch.Tensor:
    return torch.randint(0, size, (BATCH, length), generator=torch.Generator().manual_seed(0))


def _randn(model: Any, *sizes: int) -> torch.Tensor:
    return torch.randn((BATCH, *sizes), generator=torch.Generator().manual_seed(0)).to(model.dtype)


_MODELS: dict[str, Callable[[Any], dict[str, Component]]] = {
    **dict.fromkeys(
        (
            "BartForConditionalGeneration",
            "MBartForConditionalGeneration",
            "MT5ForConditionalGeneration",
            "MarianMTModel",
            "PegasusForConditionalGeneration",
            "T5ForConditionalGeneration",
            "WhisperForConditionalGeneration",
        ),
        _encoder_decoder,
    ),
    "CLIPModel": _two_towers,
    "InternVLForConditionalGeneration": _vision_language,
    "LlavaForConditionalGeneration": _vision_language,
    "SamModel": _masks,
}
