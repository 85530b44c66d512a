"""Bases from directories that transformers' save_pretrained wrote: config.json and safetensors.

Nothing is downloaded and no code of the directory is run.  The model is of the class that the config names, and its
example inputs are made of the config's sizes, so neither a tokenizer nor an image processor is needed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.example_inputs import (
    Tensors,
    cached_text,
    images,
    parameters,
    run,
    text,
    text_padding,
)
from tpeft_deploy.formats.base.model import FACTORY, architecture, load_model, model_class

__all__ = ["load_causal", "load_directory"]

_log = logging.getLogger("tpeft_deploy.exporters")

_MODAL = ("input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values")
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")  # older checkpoints hold these, newer models compute them


def load_directory(path: str | os.PathLike[str]) -> tuple[nn.Module, Tensors, dict[str, Any], dict[str, int]]:
    """A model in evaluation mode with example inputs, dynamic shapes and padding, from a Hugging Face model directory.

    Text models take input_ids and attention_mask, and token_type_ids where they have them, of dynamic batch and
    sequence; causal ones take and return keys and values too (`CachedDecoder`).  Image models take pixel_values of
    dynamic batch, and of dynamic height and width if they run at sizes other than the config's.

    Args:
        path: holds config.json and model.safetensors, or its shards and their index.

    Returns:
        Module, example inputs by name, dynamic shapes by input name as `torch.export` takes them, and what inputs may
        be filled up with: nothing but for text models without a cache, and not proved yet.

    Raises:
        MissingExtra: transformers is not installed.
        UnsupportedBase: the directory is not complete, or its model is of no kind named above.
    """
    path = Path(path)
    doing = f"load base {path}"
    name = architecture(path)
    kind = model_class(path, name)
    modality = _modality(path, kind)
    model = load_model(path, kind)
    if modality != "pixel_values" and getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedBase(
            doing, expected="an encoder or a decoder", got="both", fix=f"Export its parts one by one. {FACTORY}"
        )
    _batch_experts(model, path)
    model.config.return_dict = True
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    padding: dict[str, int] = {}
    if modality == "pixel_values":
        inputs, shapes = images(model, doing)
    elif _is_causal(name):
        inputs, shapes = cached_text(model, doing)
    else:
        inputs, shapes = text(model, doing)
        padding = {name: value for name, value in text_padding(model).items() if name in inputs}
    run(model, inputs, doing)
    return model, inputs, shapes, padding


def load_causal(path: str | os.PathLike[str]) -> nn.Module:
    """A causal language model in evaluation mode, from a Hugging Face model directory.

    Raises:
        MissingExtra, UnsupportedBase: as `load_directory`, or the model is of another kind.
    """
    path = Path(path)
    name = architecture(path)
    kind = model_class(path, name)
    if _modality(path, kind) != "input_ids" or not _is_causal(name):
        raise UnsupportedBase(f"load base {path} for generation", expected="a causal language model", got=name)
    model: nn.Module = load_model(path, kind)
    _batch_experts(model, path)
    return model


def _modality(path: Path, model: type[nn.Module]) -> str:
    """The one input among texts, images, sounds and videos that a model takes, if it is one of the first two."""
    takes = [name for name in _MODAL if name in parameters(model)]
    if takes in (["input_ids"], ["pixel_values"]) and "decoder_input_ids" not in parameters(model):
        return takes[0]
    raise UnsupportedBase(
        f"load base {path}",
        expected="a model of texts or of images alone, without a separate decoder",
        got=f"{model.__name__}, which takes {', '.join(parameters(model))[:120]}",
        fix=f"Export its parts one by one. {FACTORY}",
    )


def _batch_experts(model: nn.Module, path: Path) -> None:
    """Let a mixture of experts pick a matrix per token: the other ways to compute it have no operator in ONNX."""
    can = getattr(model, "_can_set_experts_implementation", None)
    if can is not None and can():
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
        _log.info("%s: experts_implementation is set to batched_mm, which ONNX can express", path)


def _is_causal(architecture: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
