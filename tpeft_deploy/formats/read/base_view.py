"""A base as readers see it: names, and values that are read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tpeft_deploy.errors import FormatError, requires
from tpeft_deploy.formats.base.model import no_module, open_model
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.tucker import Array

__all__ = ["Lazy", "holders", "joint_view", "view"]

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """A mapping that makes each value when it is asked for, and keeps none."""

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def view(base: object) -> BaseView:
    """The parameters and buffers of a base.

    Args:
        base: a torch module (anything with its `named_parameters`, `named_buffers` and `named_modules`), the path of
            an ONNX file with the parameters' names as initializers, a Hugging Face model directory,
            "package.module:factory", an open bundle, a dict of components, or a view already.

    Raises:
        FormatError: none of these, or a module that PEFT has wrapped.
        UnsupportedBase: a directory or a factory that gives no model.
        MissingExtra: an ONNX file or a directory, and the package that reads it is not installed.
    """
    base = getattr(base, "base_view", base)  # a bundle's
    if isinstance(base, BaseView):
        return base
    if isinstance(base, str | os.PathLike):
        given = os.fspath(base)
        if Path(base).suffix == ".onnx" and not Path(base).is_dir():
            return _of_onnx(Path(base))
        base = open_model(os.fspath(base))
        if isinstance(base, type) or not (hasattr(base, "named_parameters") or _are_components(base)):
            raise no_module(given, base)
    if isinstance(base, Mapping) and _are_components(base):
        return joint_view(f"components {', '.join(base)}", [part.base_view for part in base.values()])
    name = type(base).__name__
    if not all(hasattr(base, verb) for verb in ("named_parameters", "named_buffers", "named_modules")):
        raise FormatError(
            "look into a base",
            expected="an open bundle, a torch module or the path of an ONNX file or model directory as base",
            got=repr(name),
        )
    if hasattr(base, "peft_config"):
        raise FormatError(
            f"look into base {name}",
            expected="the plain base module",
            got="one that PEFT has wrapped",
            fix="Build the base anew, or call unload() on the PEFT model.",
        )
    return _of_module(base, name)


def joint_view(name: str, views: Sequence[BaseView]) -> BaseView:
    """Base weights of several components; those of one name are equal."""
    held = {weight: view for view in reversed(views) for weight in view.weights}
    values = Lazy(held, lambda weight: held[weight].weights[weight])
    kinds = {path: kind for view in views for path, kind in view.kinds.items()}
    shapes = {weight: view.shape(weight) for weight, view in held.items()}
    digests = {weight: view.digests[weight] for weight, view in held.items() if weight in view.digests}
    return BaseView(name, values, kinds, shapes, digests)


def _are_components(base: object) -> bool:
    """Whether a base is a dict of components, each with the view of a part."""
    return isinstance(base, Mapping) and bool(base) and all(hasattr(type(part), "base_view") for part in base.values())


def holders(base: Any) -> dict[str, tuple[int, str]]:
    """Every name of a parameter or buffer of a torch module -> which module holds it, and the name there."""
    return {
        f"{path}.{name}" if path else name: (id(module), name)
        for path, module in base.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }


def _of_module(base: Any, name: str) -> BaseView:
    tensors = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    kinds = {path: type(module).__name__ for path, module in base.named_modules(remove_duplicate=False) if path}
    shapes = {weight: tuple(tensor.shape) for weight, tensor in tensors.items()}
    return BaseView(name, Lazy(tensors, lambda weight: _numpy(tensors[weight])), kinds, shapes)


def _numpy(tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16, and every value of it is a float32.
    array: Array = (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
    return array


def _of_onnx(path: Path) -> BaseView:
    if not path.is_file():
        raise FormatError(f"look into base {path}", expected="an .onnx file", got="no such file", fix="Check the path.")
    with requires("onnx-ir", "export", f"look into base {path}"):
        import onnx_ir as ir
    try:
        graph = ir.load(path).graph
    except Exception as error:  # whatever protobuf and onnx-ir raise for a damaged file; the cause is kept
        raise FormatError(f"look into base {path}", expected="an ONNX model", got=str(error)[:200]) from error
    values = {name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None}
    return BaseView(path.name, Lazy(values, lambda name: np.asarray(values[name].numpy())))
