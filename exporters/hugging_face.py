"""Bases from directories that transformers' save_pretrained wrote: config.json and safetensors.

Nothing is downloaded and no code of the directory is run.  The model is of the class that the config names, and its
example inputs are made of the config's sizes, so neither a tokenizer nor an image processor is needed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tpeft_deploy.errors import MissingExtra, UnsupportedBase
from tpeft_deploy.exporters.example_inputs import (
    FACTORY,
    Tensors,
    cached_text,
    images,
    parameters,
    run,
    text,
    text_padding,
)

__all__ = ["load_directory"]

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
    architecture = _architecture(path)
    model = _load(path, _model_class(path, architecture))
    doing = f"load base {path}"
    padding: dict[str, int] = {}
    if _modality(path, type(model)) == "pixel_values":
        inputs, shapes = images(model, doing)
    elif _is_causal(architecture):
        inputs, shapes = cached_text(model, doing)
    else:
        inputs, shapes = text(model, doing)
        padding = {name: value for name, value in text_padding(model).items() if name in inputs}
    run(model, inputs, doing)
    return model, inputs, shapes, padding


def _transformers(path: Path) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            f"load base {path}",
            expected="transformers to be installed, for a Hugging Face model directory",
            got=str(error),
            fix="pip install 'tpeft-deploy[hf]'.",
        ) from error
    module: ModuleType = transformers
    return module


def _architecture(path: Path) -> str:
    """The class name in config.json, once the directory is known to hold a whole model and nothing but one."""
    doing = f"load base {path}"
    file = path / "config.json"
    if not file.is_file():
        raise UnsupportedBase(
            doing,
            expected="a Hugging Face model directory: config.json and model.safetensors",
            got="a directory without config.json",
            fix="Write one with save_pretrained().",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedBase(doing, problem=f"config.json cannot be read ({error})") from error
    if (path / "adapter_config.json").exists():
        raise UnsupportedBase(
            doing, expected="a base", got="a directory with a PEFT adapter in it", fix="Keep the adapter in its own."
        )
    if not any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise UnsupportedBase(
            doing,
            expected="weights in model.safetensors, or in shards with model.safetensors.index.json",
            got="neither",
            fix="Load it with transformers and write it anew with save_pretrained().",
        )
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedBase(
            doing,
            expected="config.json to name the model's class under 'architectures'",
            got=repr(names),
            fix="Write the directory with save_pretrained() of the model itself.",
        )
    if config.get("quantization_config"):
        raise UnsupportedBase(doing, expected="plain weights", got="quantised ones (quantization_config)", fix=FACTORY)
    return names[0]


def _model_class(path: Path, architecture: str) -> Any:
    transformers = _transformers(path)
    found = getattr(transformers, architecture, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UnsupportedBase(
            f"load base {path}",
            expected=f"a model class of transformers {transformers.__version__}",
            got=f"architecture {architecture!r}",
            fix=FACTORY,
        )
    _modality(path, found)
    return found


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


def _is_causal(architecture: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _load(path: Path, model: Any) -> Any:
    doing = f"load base {path}"
    try:
        with _silent():
            loaded, info = model.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype="auto",
                # The other implementations choose by the values of masks, or by shapes, which a trace would freeze.
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # models raise every kind of exception; the cause is kept
        raise UnsupportedBase(
            doing, problem=f"transformers cannot load it ({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error
    _check_complete(doing, type(loaded).__name__, info)
    if getattr(loaded.config, "is_encoder_decoder", False):
        raise UnsupportedBase(
            doing, expected="an encoder or a decoder", got="both", fix=f"Export its parts one by one. {FACTORY}"
        )
    loaded.config.return_dict = True
    if hasattr(loaded.config, "use_cache"):
        loaded.config.use_cache = False
    return loaded.eval()


def _check_complete(doing: str, name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers would fill weights with random numbers; say which ones it leaves out."""
    fix = f"Write the directory anew with save_pretrained() of the trained {name}, and name its class in config.json."
    missing, unused = (_listed(info[what]) for what in ("missing_keys", "unexpected_keys"))
    if missing:
        raise UnsupportedBase(doing, expected=f"every weight of {name}", got=f"no weights for {missing}", fix=fix)
    if unused:
        _log.warning("%s: %s has no use for the weights %s", doing, name, unused)
    if info["mismatched_keys"] or info["error_msgs"]:
        raise UnsupportedBase(
            doing, problem=f"{info['mismatched_keys'] or ''}{info['error_msgs'] or ''}"[:300], fix=fix
        )


def _listed(keys: Iterable[str]) -> str:
    found = sorted(key for key in keys if not key.endswith(_COMPUTED))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and no report of what could not be loaded: that is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
