"""Load the torch module of a base from a Hugging Face model directory or package.module:factory.

Nothing is downloaded, and no code from a directory is run.  The module is instantiated: file headers are not enough,
because save_pretrained leaves out tied weights and may use older names, which only the model class resolves.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpeft_deploy.errors import TpeftError, UnsupportedBase, brief, requires
from tpeft_deploy.formats.base.diffusers_model import is_diffusers, load_diffusers

__all__ = [
    "FACTORY",
    "CalledFactory",
    "architecture",
    "call_factory",
    "called",
    "load_model",
    "model_class",
    "no_module",
    "open_model",
]

FACTORY = "Write a function that returns (module, example_inputs) and give it as 'package.module:function'."

_log = logging.getLogger("tpeft_deploy.exporters")

_COMPUTED = ("position_ids", "rotary_emb.inv_freq")  # older checkpoints hold these, newer models compute them


class CalledFactory(str):
    """Name "package.module:factory" with the result of its only call, which every later use of the name takes."""

    result: object


def called(base: object) -> object:
    """Call a base that is the name of a factory; return its name with the result, and any other base unchanged.

    Raises:
        UnsupportedBase: there is no such callable, or it fails.
    """
    if not isinstance(base, str) or os.path.isdir(base) or base.endswith(".onnx") or isinstance(base, CalledFactory):
        return base
    name = CalledFactory(base)
    name.result = call_factory(base)
    return name


def open_model(base: str) -> object:
    """Load the module of a Hugging Face or diffusers model directory, or of a factory.

    Args:
        base: path of the directory, or "package.module:factory".

    Raises:
        MissingExtra: the library that wrote the directory is not installed.
        UnsupportedBase: the base cannot be loaded.
    """
    if os.path.isdir(base):
        if is_diffusers(base):
            return load_diffusers(base)
        return load_model(Path(base), model_class(Path(base), architecture(Path(base))))
    made = call_factory(base)
    return made[0] if isinstance(made, tuple) and made else made


def call_factory(name: str) -> object:
    """Call "package.module:factory"; return its result: a module, a tuple that begins with one, or components.

    Raises:
        UnsupportedBase: there is no such callable.
    """
    if isinstance(name, CalledFactory):
        return name.result
    module_name, _, function_name = name.partition(":")
    if not function_name or os.path.sep in name:
        raise UnsupportedBase(
            f"load base {name}",
            expected="package.module:factory, an .onnx file, or a Hugging Face model directory on this machine",
            got=repr(name),
            fix="Nothing is downloaded.",
        )
    factory = _factory(name, module_name, function_name)
    try:
        return factory()
    except TpeftError:
        raise
    except Exception as error:  # factories may raise any exception; the cause is kept
        raise UnsupportedBase(
            f"load base {name}",
            problem=f"the factory fails ({type(error).__name__}: {brief(error)})",
            fix="It is called without arguments.",
        ) from error


def no_module(name: str, got: object) -> UnsupportedBase:
    """Make the error for a base that is not a torch module.

    Args:
        name: name of the base, for the message.
        got: value found instead.
    """
    fixes = {
        "a class": "Make an instance of it and load the trained weights.",
        "a function": "Name it as 'package.module:function', or call it and pass what it returns.",
        "a state dict": "Build its module, call load_state_dict with it, and pass the module.",
        "a tuple": "Pass the module as base and the inputs as example_inputs.",
    }
    what = (
        "a class"
        if isinstance(got, type)
        else "a state dict"
        if isinstance(got, Mapping)
        else "a tuple"
        if isinstance(got, tuple)
        else "a function"
        if callable(got)
        else ""
    )
    found = getattr(got, "__name__", type(got).__name__)
    return UnsupportedBase(
        f"load base {name}",
        expected="a torch.nn.Module",
        got=f"{what} ({found})" if what else found,
        fix=fixes.get(what, FACTORY),
    )


def _factory(name: str, module_name: str, function_name: str) -> Callable[[], object]:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: factories are in the user's working directory
    try:
        factory: Callable[[], object] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedBase(
            f"load base {name}",
            expected=f"a callable {function_name!r} in module {module_name!r}",
            got=str(error),
            fix="Run from the directory that holds the module, or install it.",
        ) from error
    except Exception as error:  # modules may raise any exception on import; the cause is kept
        raise UnsupportedBase(
            f"load base {name}", problem=f"importing {module_name} fails ({type(error).__name__}: {brief(error)})"
        ) from error
    if not callable(factory):
        raise UnsupportedBase(
            f"load base {name}", expected=f"a callable {function_name!r}", got=type(factory).__name__, fix=FACTORY
        )
    return factory


def architecture(path: Path) -> str:
    """Class name in config.json, after checking that the directory holds one complete model."""
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
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedBase(doing, problem=f"config.json cannot be read ({error})") from error
    if (path / "adapter_config.json").exists():
        raise UnsupportedBase(
            doing,
            expected="a base",
            got="a directory with a PEFT adapter in it",
            fix="Keep the adapter in a separate directory.",
        )
    if not any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise UnsupportedBase(
            doing,
            expected="weights in model.safetensors, or in shards with model.safetensors.index.json",
            got="neither",
            fix="Load it with transformers and write it again with save_pretrained().",
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


def model_class(path: Path, name: str) -> Any:
    """Class of transformers that config.json names."""
    with requires("transformers", "hf", f"load base {path}"):
        import transformers
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UnsupportedBase(
            f"load base {path}",
            expected=f"a model class of transformers {transformers.__version__}",
            got=f"architecture {name!r}",
            fix=FACTORY,
        )
    return found


def load_model(path: Path, model: Any) -> Any:
    """Load a model of a class in evaluation mode, with all weights from the directory."""
    doing = f"load base {path}"
    try:
        with _silent():
            loaded, info = model.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype="auto",
                # Other implementations branch on the values of masks or on shapes, which a trace would freeze.
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # models may raise any exception; the cause is kept
        raise UnsupportedBase(
            doing, problem=f"transformers cannot load it ({type(error).__name__}: {brief(error, 300)})"
        ) from error
    _check_complete(doing, type(loaded).__name__, info)
    return loaded.eval()


def _check_complete(doing: str, name: str, info: Mapping[str, Any]) -> None:
    """Raise if the directory lacks weights, which transformers would initialise at random; name them."""
    fix = f"Write the directory again with save_pretrained() of the trained {name}, and name its class in config.json."
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
    """Disable progress bars and the report of missing weights, which are raised as an error."""
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
