"""Finding the base: a module, a factory's name, a directory or a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases import dotted_names
from tpeft_deploy.exporters.bases.foreign.known_weights import read_weights
from tpeft_deploy.exporters.bases.onnx_file import OnnxBase
from tpeft_deploy.exporters.bases.renamed import Renamed
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.formats.base.diffusers_model import is_diffusers
from tpeft_deploy.formats.base.model import call_factory, no_module

__all__ = ["load_base"]


_FIXES: Mapping[type, str] = {
    type(None): "Leave it out: forward's default is used.",
    dict: "Give each of its tensors as an input 'name.key': forward gets them as one dict.",
    list: "Wrap the module in one with a parameter for each tensor.",
    tuple: "Wrap the module in one with a parameter for each tensor.",
    np.ndarray: "Use torch.from_numpy.",
}


def load_base(
    base: object,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    weights: object = None,
    rename: Mapping[str, str] | None = None,
    generation: bool = False,
) -> Base:
    """Make a base of a torch module, of the name of a callable that returns one, or of an ONNX file.

    Args:
        base: a module; "package.module:factory", which returns (module, example inputs) or (module, example
            inputs, dynamic shapes); a Hugging Face or diffusers model directory, of which `hugging_face` and
            `diffusers_directory` make all three; or the path of an .onnx file.  A base that is loaded already is
            returned as it is.
        example_inputs: tensors by input name, a dict for an input that is one; the first axis is the batch.  An ONNX
            file takes arrays too, and needs none: its inputs are then made at random, two rows, with integers of 0
            and 1.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input is dynamic.
        weights: the original weights of an ONNX file, by which its initializers are found: a .safetensors file, a
            Hugging Face model directory, a torch module or its state_dict, or a mapping of names to arrays.  Without
            them the digests that adapters recorded are used.
        rename: other names for inputs and outputs, the base's own -> the new one.
        generation: whether a causal language model becomes one in slot form (`slot_decoder`), which has example
            inputs and names of its kind.

    Raises:
        UnsupportedBase: it cannot be loaded, or is not a plain torch module with example inputs.
    """
    if generation:
        return _load_decoder(base, [example_inputs, dynamic_shapes, weights, rename])
    loaded = base if isinstance(base, Base) else _load(base, example_inputs, dynamic_shapes, weights)
    return Renamed(loaded, rename) if rename else loaded


def _load(
    base: object, example_inputs: Mapping[str, Any] | None, dynamic_shapes: Mapping[str, Any] | None, weights: object
) -> Base:
    if isinstance(base, str | os.PathLike) and Path(base).suffix == ".onnx":
        return _open_file(Path(base), example_inputs, dynamic_shapes, weights)
    if weights is not None:
        raise UnsupportedBase(
            f"load base {base if isinstance(base, str) else type(base).__name__}",
            expected="no weights=, as a module has its own",
            got="some",
            fix="Leave weights out; they are for ONNX files.",
        )
    name, padding, directory = type(base).__name__, dict[str, int](), None
    if isinstance(base, str | os.PathLike):
        name = os.fspath(base)
        directory = Path(name) if os.path.isdir(name) and not is_diffusers(name) else None
        own = dynamic_shapes
        base, example_inputs, dynamic_shapes, padding = _call_factory(name, example_inputs, dynamic_shapes)
        if own is None and isinstance(dynamic_shapes, Mapping) and isinstance(example_inputs, Mapping):
            # A directory says it of all that its model takes; the caller may give less.
            dynamic_shapes = {key: axes for key, axes in dynamic_shapes.items() if key in example_inputs}
    if not isinstance(base, nn.Module):
        raise no_module(name, base)
    if hasattr(base, "peft_config"):
        raise UnsupportedBase(
            f"load base {name}",
            expected="the plain base module",
            got="one that PEFT has wrapped",
            fix="Build the base anew, or call unload() on the PEFT model.",
        )
    inputs = _check_inputs(name, example_inputs)
    if dynamic_shapes is None:
        inputs = _two_rows(inputs)
        dynamic_shapes = {key: {0: "batch"} if value.ndim else None for key, value in inputs.items()}
    given: Any = dynamic_shapes  # from a caller, perhaps of another type than annotated
    shapes = dotted_names.flatten(given) if isinstance(given, Mapping) else given
    _check_shapes(name, inputs, shapes)
    made = TorchBase(name.rpartition(":")[2], base, inputs, shapes)
    made.padding = {name: value for name, value in padding.items() if name in inputs}
    made.directory = directory
    return made


def _load_decoder(base: object, others: list[object]) -> Base:
    from tpeft_deploy.exporters.bases import hugging_face
    from tpeft_deploy.exporters.bases.slot_decoder import decoder_base

    if isinstance(base, Base) and base.decoder is not None:
        return base
    name = os.fspath(base) if isinstance(base, str | os.PathLike) else type(base).__name__
    if any(other is not None and other != {} for other in others):
        raise UnsupportedBase(
            f"load base {name} for generation",
            expected="no example_inputs, dynamic_shapes, weights or rename, as a decoder has its own",
            got="some",
            fix="Leave them out.",
        )
    module = base
    if isinstance(base, str | os.PathLike):
        module = hugging_face.load_causal(name) if os.path.isdir(name) else call_factory(name)
        module = module[0] if isinstance(module, tuple) and module else module
    if not isinstance(module, nn.Module) or hasattr(module, "peft_config"):
        raise no_module(name, module)
    made = decoder_base(name.rpartition(":")[2], module)
    made.directory = Path(name) if module is not base and os.path.isdir(name) else None
    return made


def _open_file(path: Path, inputs: Mapping[str, Any] | None, shapes: object, weights: object) -> OnnxBase:
    if shapes is not None:
        raise UnsupportedBase(
            f"load base {path}", expected="no dynamic_shapes, as the file has its own", got="some", fix="Leave it out."
        )
    return OnnxBase(path, inputs, read_weights(weights) if weights is not None else None)


def _call_factory(
    name: str, inputs: Mapping[str, torch.Tensor] | None, shapes: Mapping[str, Any] | None
) -> tuple[object, Mapping[str, torch.Tensor] | None, Mapping[str, Any] | None, dict[str, int]]:
    if os.path.isdir(name):
        from tpeft_deploy.exporters.bases import diffusers_directory, hugging_face

        found = diffusers_directory if is_diffusers(name) else hugging_face
        module, own_inputs, own_shapes, padding = found.load_directory(name)
        return module, inputs or own_inputs, shapes or own_shapes, padding
    result = call_factory(name)
    if isinstance(result, nn.Module):
        return result, inputs, shapes, {}
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UnsupportedBase(
            f"load base {name}",
            expected="the factory to return (module, example_inputs) or (module, example_inputs, dynamic_shapes)",
            got=type(result).__name__,
        )
    module, own_inputs, own_shapes = (*result, None)[:3]
    return module, inputs or own_inputs, shapes or own_shapes, {}


def _check_inputs(name: str, inputs: object) -> dict[str, torch.Tensor]:
    if not isinstance(inputs, Mapping) or not inputs:
        raise UnsupportedBase(
            f"load base {name}",
            expected="example_inputs: a dict of input name -> tensor",
            got="none" if inputs is None else type(inputs).__name__,
            fix="Pass example_inputs={'input name': tensor}, named as the forward method names them.",
        )
    inputs = dotted_names.flatten(inputs)
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.is_meta:
            got = f"a {type(value).__name__}{' on the meta device' if isinstance(value, torch.Tensor) else ''}"
            raise UnsupportedBase(
                f"load base {name}, input {key!r}",
                expected="a torch.Tensor with values",
                got=got,
                fix=_FIXES.get(type(value), "Make a tensor of it, or let the module hold it."),
            )
    return inputs


def _check_shapes(name: str, inputs: Mapping[str, torch.Tensor], shapes: object) -> None:
    """Refuse dynamic_shapes of other inputs, or of axes that an input does not have."""
    doing, fix = (
        f"load base {name}, dynamic_shapes",
        "Write {input: {axis: name}}, and None for an input of fixed size.",
    )
    if not isinstance(shapes, Mapping) or shapes.keys() != inputs.keys():
        got = ", ".join(map(str, shapes)) if isinstance(shapes, Mapping) else type(shapes).__name__
        raise UnsupportedBase(doing, expected=f"a dict with the inputs {', '.join(inputs)}", got=got or "none", fix=fix)
    for key, value in shapes.items():
        axes = inputs[key].ndim
        fits = value is None or (
            all(isinstance(axis, int) and -axes <= axis < axes for axis in value)
            if isinstance(value, Mapping)
            else isinstance(value, list | tuple) and len(value) == axes
        )
        if not fits:
            expected = f"a dict of axis -> name for its {axes} axes" if axes else "None, as it has no axes"
            raise UnsupportedBase(f"{doing} of input {key!r}", expected=expected, got=repr(value)[:100], fix=fix)


def _two_rows(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """At least two rows: the exporter takes a size of 1 for a constant."""
    if any(value.ndim and value.shape[0] == 1 for value in inputs.values()):
        return {key: torch.cat([value, value]) if value.ndim else value for key, value in inputs.items()}
    return inputs
