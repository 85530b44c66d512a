"""Load a diffusers model from a directory written by save_pretrained: config.json and safetensors.

Nothing is downloaded, and no code from the directory is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpeft_deploy.errors import UnsupportedBase, requires

__all__ = ["is_diffusers", "load_diffusers"]

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PIPELINE = "model_index.json"


def is_diffusers(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a model or a pipeline that diffusers wrote."""
    return (Path(path) / _PIPELINE).is_file() or "_class_name" in _read(Path(path) / "config.json")


def load_diffusers(path: str | os.PathLike[str]) -> Any:
    """Load a model in evaluation mode, with the dtype and all weights of its directory.

    Args:
        path: directory with config.json, which has `_class_name`, and diffusion_pytorch_model.safetensors or its shards
            and index.

    Raises:
        MissingExtra: diffusers is not installed.
        UnsupportedBase: the directory holds a pipeline or an incomplete model, or diffusers does not have the class.
    """
    path = Path(path)
    doing = f"load base {path}"
    _check_files(path, doing)
    kind = _class(path, doing)
    try:
        model, info = kind.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=_dtype(path),
        )
    except Exception as error:  # models may raise any exception; the cause is kept
        raise UnsupportedBase(
            doing, problem=f"diffusers cannot load it ({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error
    wrong = [key for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[what]]
    if wrong:
        raise UnsupportedBase(
            doing,
            expected=f"the weights of {kind.__name__} and no others",
            got=f"missing, unexpected or of another shape: {', '.join(map(str, sorted(wrong, key=str)[:3]))}",
            fix="Write the directory again with save_pretrained() of the model.",
        )
    return model.eval()


def _check_files(path: Path, doing: str) -> None:
    index = _read(path / _PIPELINE)
    if (path / _PIPELINE).is_file():
        parts = [name for name in index if (path / name / "config.json").is_file()]
        raise UnsupportedBase(
            doing,
            expected="one model",
            got=f"a pipeline of diffusers ({index.get('_class_name', 'of no class')})",
            fix="Give the folder of one of its models: "
            + (", ".join(str(path / name) for name in parts) or "none of them is here")
            + ".",
        )
    if not any((path / f"{_WEIGHTS}{end}").is_file() for end in ("", ".index.json")):
        raise UnsupportedBase(
            doing,
            expected=f"weights in {_WEIGHTS}, or in shards with {_WEIGHTS}.index.json",
            got="neither",
            fix="Load it with diffusers and write it again with save_pretrained().",
        )
    if _read(path / "config.json").get("quantization_config"):
        raise UnsupportedBase(doing, expected="plain weights", got="quantised ones (quantization_config)")


def _class(path: Path, doing: str) -> Any:
    with requires("diffusers", "diffusers", doing):
        import diffusers
    name = str(_read(path / "config.json").get("_class_name"))
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise UnsupportedBase(
            doing, expected=f"a model class of diffusers {diffusers.__version__}", got=f"_class_name {name!r}"
        )
    return found


def _dtype(path: Path) -> Any:
    """The dtype of most weights; diffusers would convert them to float32."""
    import torch
    from safetensors import safe_open

    file = path / _WEIGHTS
    if not file.is_file():
        shards = _read(path / f"{_WEIGHTS}.index.json").get("weight_map", {})
        file = path / Path(min(shards.values(), default="")).name
    with safe_open(file, "pt") as weights:
        found = [weights.get_slice(name).get_dtype() for name in weights.keys()]  # noqa: SIM118
    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    return names.get(max(set(found), key=found.count), torch.float32)


def _read(file: Path) -> Mapping[str, Any]:
    """Object of a JSON file; empty if the file does not exist."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
