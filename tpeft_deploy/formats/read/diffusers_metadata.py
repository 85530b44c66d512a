"""The configuration that diffusers writes into a safetensors header, as `lora_adapter_metadata`, in JSON.

`save_lora_adapter` of one model writes the fields of a LoraConfig; `save_lora_weights` of a pipeline writes those of
every model with the model's name before them: "unet.r", "text_encoder.lora_alpha".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.safetensors_file import parse_json
from tpeft_deploy.formats.read.saved import Saved

__all__ = ["FILE", "configured", "diffusers_file"]

FILE = "pytorch_lora_weights.safetensors"
_KEY = "lora_adapter_metadata"
_TENSORS = ("lora_A.", "lora_B.", "lora_magnitude_vector")


def diffusers_file(path: Path) -> Path | None:
    """The file in a directory that `save_lora_adapter` or `save_lora_weights` wrote; None for another path."""
    return path / FILE if (path / FILE).is_file() else None


def configured(saved: Saved) -> Saved:
    """What was saved with the configuration of its header, where there is one and the tensors are PEFT's.

    Raises:
        FormatError: the header's text is no JSON object, or tells of several models and the file holds several.
    """
    if saved.config or _KEY not in saved.metadata or not any(mark in key for key in saved.tensors for mark in _TENSORS):
        return saved
    try:
        fields = parse_json(saved.metadata[_KEY])
    except ValueError as error:
        raise FormatError(f"read {saved.source}, {_KEY}", expected="JSON", got=str(error)[:200]) from error
    if not isinstance(fields, dict):
        raise FormatError(f"read {saved.source}, {_KEY}", expected="a JSON object", got=type(fields).__name__)
    if "r" in fields:
        return _with(saved, fields)
    models = sorted({key.partition(".")[0] for key in saved.tensors})
    if len(models) != 1:
        raise FormatError(
            f"read {saved.source}",
            expected="the tensors of one model, as each has a configuration",
            got=f"those of {', '.join(models)}",
            fix=f"Give one of them as part= (--part {models[0]}).",
        )
    start = f"{models[0]}."
    own = {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
    return _with(saved, own) if own else saved


def _with(saved: Saved, config: Mapping[str, Any]) -> Saved:
    return replace(saved, config={"peft_type": "LORA", **config})
