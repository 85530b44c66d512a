"""Files of training libraries as tensors and configuration, before their formats are detected.

    a PEFT directory       adapter_config.json and adapter_model.safetensors
    a .safetensors file    all that LyCORIS, kohya and FLoRA write

Pickles can run code when they are read, so only `convert` reads them (`pickles=True`), with torch's reader that is
restricted to tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpeft_deploy.errors import FormatError, brief, requires
from tpeft_deploy.formats.read.safetensors_file import parse_json, read_bytes, read_tensors, require_finite
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.tucker import Array

__all__ = [
    "CONFIG",
    "TENSORS",
    "Saved",
    "configured",
    "diffusers_file",
    "peft_directory",
    "peft_type",
    "read_config",
    "read_labels",
    "read_saved",
]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_SAVE_AGAIN = "Save the adapter again with save_pretrained."
_MOST_CONFIG = 16 * 2**20  # bytes: masks of AdaLoRA for 10,000 modules, or a million token indices
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
_PEFT_PICKLE = "adapter_model.bin"
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_LORA_TENSORS = ("lora_A.", "lora_B.", "lora_magnitude_vector")


@dataclass(frozen=True, eq=False)
class Saved:
    """Tensors by the keys that the file gives them.

    Args:
        source: path they were read from, for messages.
        tensors: key -> tensor, finite.
        config: adapter_config.json of a PEFT directory, else empty.
        metadata: metadata of the safetensors header.
        directory: whether this is a PEFT directory, which may hold whole tensors (heads, biases) as well.
    """

    source: str
    tensors: dict[str, Array]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    directory: bool = False


def peft_directory(path: Path) -> Path | None:
    """The PEFT directory at `path`, or of the tensors file at `path`: without its config the scale would be lost."""
    place = path.parent if path.name in (TENSORS, _PEFT_PICKLE) else path
    return place if (place / CONFIG).is_file() else None


def peft_type(path: Path) -> str | None:
    """Read `peft_type` from a directory's adapter_config.json; None if there is no such file.

    Raises:
        FormatError: the file is not JSON.
    """
    if not (path / CONFIG).is_file():
        return None
    stated = read_config(path / CONFIG).get("peft_type")
    return stated if isinstance(stated, str) else None


def read_saved(path: Path, *, pickles: bool = False) -> Saved:
    """Read a PEFT directory or a single file.

    Raises:
        FormatError: neither, damaged, not finite, or a pickle that was not asked for.
        MissingExtra: a pickle, and torch is not installed.
    """
    place = peft_directory(path)
    if place is not None:
        config = read_config(place / CONFIG)
        file = place / TENSORS
        if not file.is_file() and (place / _PEFT_PICKLE).is_file():
            file = place / _PEFT_PICKLE
        tensors, metadata = _read(file, str(place), pickles=pickles)
        return Saved(str(place), _without_wrappers(tensors), config, metadata, directory=True)
    tensors, metadata = _read(path, str(path), pickles=pickles)
    return Saved(str(path), tensors, {}, metadata)


def _read(file: Path, source: str, *, pickles: bool) -> tuple[dict[str, Array], dict[str, str]]:
    if file.suffix in _PICKLES:
        if not pickles:
            raise FormatError(
                f"read {source}",
                expected="safetensors",
                got=f"{file.name}, a pickle, which can run code when it is read",
                fix="Turn it into safetensors first: 'tpeft-deploy convert ADAPTER OUT --to tpeft'.",
            )
        return _unpickle(file), {}
    return read_tensors(read_bytes(file), source=source)


def _without_wrappers(tensors: dict[str, Array]) -> dict[str, Array]:
    """Drop the copies that PEFT's `save_embedding_layers` writes beside a saved module, and PEFT ignores."""

    def plain(key: str) -> str:
        return key.replace(".original_module.", ".").replace(".modules_to_save.", ".")

    wrapped = [key for key in tensors if ".original_module." in key or ".modules_to_save." in key]
    copies = {key for key in wrapped if plain(key) in tensors}
    return {key: tensor for key, tensor in tensors.items() if key not in copies} if copies else tensors


def read_config(file: Path) -> dict[str, Any]:
    """The object in an adapter_config.json.

    Raises:
        FormatError: it cannot be read, is too large, or is no JSON object.
    """
    data = read_bytes(file)
    if len(data) > _MOST_CONFIG:
        raise FormatError(f"read {file}", expected=f"at most {_MOST_CONFIG} bytes", got=len(data))
    try:
        config = parse_json(data)
    except ValueError as error:
        raise FormatError(f"read {file}", expected="JSON", got=brief(error), fix=_SAVE_AGAIN) from error
    if not isinstance(config, dict):
        raise FormatError(f"read {file}", expected="a JSON object", got=type(config).__name__)
    return config


def read_labels(directory: Path) -> HeadLabels | None:
    """Classes of a task's head, of a PEFT directory.

    They are `id2label` and `problem_type` of adapter_config.json, or of the model's config.json beside it; None where
    neither has them, or can be read.
    """
    for file in (directory / CONFIG, directory / "config.json"):
        with suppress(FormatError, OSError):
            found = HeadLabels.of_config(read_config(file))
            if found is not None:
                return found
    return None


def _unpickle(file: Path) -> dict[str, Array]:
    with requires("torch, which reads pickles,", "export", f"read {file}"):
        import torch
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises every kind of exception; the cause is kept
        raise FormatError(
            f"read {file}", expected="a pickle of tensors alone", got=f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise FormatError(f"read {file}", expected="a dict of tensors by name", got=type(state).__name__)
    tensors: dict[str, Array] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FormatError(f"read {file}, entry {key!r}", expected="a tensor", got=type(value).__name__)
        plain = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        tensors[key] = plain.numpy()
    require_finite(tensors, source=str(file))
    return tensors


def diffusers_file(path: Path) -> Path | None:
    """The file in a directory that `save_lora_adapter` or `save_lora_weights` wrote; None for another path."""
    return path / _DIFFUSERS_FILE if (path / _DIFFUSERS_FILE).is_file() else None


def configured(saved: Saved) -> Saved:
    """Add the configuration of the file's header, if there is one and the tensors are PEFT's.

    `save_lora_adapter` of one model writes the fields of a LoraConfig; `save_lora_weights` of a pipeline writes those
    of every model after the model's name: "unet.r", "text_encoder.lora_alpha".

    Raises:
        FormatError: the header's text is no JSON object, or tells of several models and the file holds several.
    """
    is_lora = any(mark in key for key in saved.tensors for mark in _LORA_TENSORS)
    if saved.config or _METADATA not in saved.metadata or not is_lora:
        return saved
    try:
        fields = parse_json(saved.metadata[_METADATA])
    except ValueError as error:
        raise FormatError(f"read {saved.source}, {_METADATA}", expected="JSON", got=str(error)[:200]) from error
    if not isinstance(fields, dict):
        raise FormatError(f"read {saved.source}, {_METADATA}", expected="a JSON object", got=type(fields).__name__)
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
