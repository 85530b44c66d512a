"""A base model from anywhere, as a raw ONNX graph plus the torch module it came from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters import dotted
from tpeft_deploy.exporters.quiet import quiet

__all__ = ["OPSET", "Base", "Inputs", "load_base", "trace"]

OPSET = 20

_DTYPES = {torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool}

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Base:
    """A torch module with what is needed to trace and run it.

    Args:
        name: for messages and as the default name of a bundle.
        module: in whatever mode it is; it is traced and run in evaluation mode and left as it was.
        inputs: by input name, first axis the batch.
        dynamic_shapes: as `torch.export` takes them, by input name.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    dynamic_shapes: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter and buffer by every name it has, tied ones included; no copies on the CPU."""
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        tensors |= dict(self.module.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    def check_dtypes(self) -> None:
        """Refuse weights that numpy cannot hold: sums and digests are made there."""
        for name, tensor in self.module.state_dict().items():
            if tensor.dtype not in _DTYPES:
                raise UnsupportedBase(
                    f"load base {self.name}, weight {name!r}",
                    expected="float32, float16, float64, integers or booleans",
                    got=str(tensor.dtype).removeprefix("torch."),
                    fix="Convert the module with .float() or .half().",
                )

    @property
    def aliases(self) -> dict[str, str]:
        """Every name of a parameter or buffer -> the first name of the same tensor."""
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        for name, tensor in [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]:
            names[name] = first.setdefault(id(tensor), name)
        return names

    @property
    def batched(self) -> set[str]:
        """The inputs whose first axis is dynamic: the batch."""
        return {name for name in self.inputs if _is_dynamic(self.dynamic_shapes.get(name))}

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter whose names, shapes or recorded base digests do not fit.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: it does not fit.
        """
        weights = self.weights
        adapter.check_shapes({name: weight.shape for name, weight in weights.items()}, base=f"base {self.name}")
        digests = {name: weight_digest(weights[name]) for name in adapter.base_digests if name in weights}
        adapter.check_digests(digests, base=f"base {self.name}")

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module in evaluation mode without gradients; every submodule's mode is put back."""
        modes = [(module, module.training) for module in self.module.modules()]
        try:
            with torch.no_grad():
                yield self.module.eval()
        finally:
            for module, training in modes:
                module.training = training


def load_base(
    base: object,
    *,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Base:
    """Make a base of a torch module, or of the name of a callable that returns one.

    Args:
        base: a module; "package.module:factory" whose factory returns (module, example inputs) or
            (module, example inputs, dynamic shapes); or a Hugging Face model directory, of which
            `tpeft_deploy.exporters.hugging_face` makes all three.  A base that is loaded already is returned as it is.
        example_inputs: by input name; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input is dynamic.

    Raises:
        UnsupportedBase: it cannot be loaded, or is not a plain torch module with example inputs.
    """
    if isinstance(base, Base):
        return base
    name = type(base).__name__
    if isinstance(base, str | os.PathLike):
        name = os.fspath(base)
        base, example_inputs, dynamic_shapes = _call_factory(name, example_inputs, dynamic_shapes)
    if not isinstance(base, nn.Module):
        raise UnsupportedBase(f"load base {name}", expected="a torch.nn.Module", got=type(base).__name__)
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
    loaded = Base(name.rpartition(":")[2], base, inputs, dynamic_shapes)
    loaded.check_dtypes()
    return loaded


def trace(base: Base) -> ir.Model:
    """Export a base raw: every weight keeps its name and value, nothing is optimised.

    Raises:
        UnsupportedBase: the torch exporter cannot trace the module.
    """
    with base.evaluating() as module, quiet():
        outputs = module(**base.inputs)
        try:
            program = torch.onnx.export(
                module,
                args=(),
                kwargs=dotted.nest(base.inputs),
                dynamo=True,
                optimize=False,
                dynamic_shapes=dotted.nest(base.dynamic_shapes),
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter raises every kind of exception; the cause is kept
            raise UnsupportedBase(
                f"export base {base.name}",
                problem=f"the torch exporter failed ({type(error).__name__}: {str(error).strip()[:300]})",
                fix="Try torch.export.export on the module alone; sizes that must vary need dynamic_shapes.",
            ) from error
    if program is None:
        raise UnsupportedBase(f"export base {base.name}", problem="the torch exporter returned no program")
    model = program.model
    dotted.restore(model.graph, base.inputs)
    _name_outputs(base, model.graph, output_names(outputs))
    return model


def output_names(outputs: object) -> list[str]:
    """Names of a module's outputs: a mapping's keys, else `output`, or `output_0`, `output_1`, ...

    A key that holds several tensors (past key values) gets one name each, `key_0`, `key_1`, ...
    """
    if isinstance(outputs, Mapping):
        named = [(str(key), _count(value)) for key, value in outputs.items()]
    else:
        named = [("output", _count(outputs))]
    return [name if count == 1 else f"{name}_{i}" for name, count in named for i in range(count)]


def _count(value: object) -> int:
    return sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _name_outputs(base: Base, graph: ir.Graph, names: list[str]) -> None:
    if len(names) != len(graph.outputs):
        raise UnsupportedBase(
            f"export base {base.name}",
            expected=f"{len(names)} tensor outputs, as the module returns",
            got=f"{len(graph.outputs)} in the graph",
        )
    taken = {value.name: value for node in graph for value in node.outputs}
    for value, name in zip(graph.outputs, names, strict=True):
        if name in graph.initializers or any(name == i.name for i in graph.inputs):
            raise UnsupportedBase(
                f"export base {base.name}, output {name!r}",
                expected="a name of its own",
                got="that of an input or a weight",
                fix="Return it under another key; ONNX has one space of names.",
            )
        other = taken.get(name)
        if other is not None and other is not value:
            other.name = f"{name}.inner"
        value.name = name


def _call_factory(
    name: str, inputs: Mapping[str, torch.Tensor] | None, shapes: Mapping[str, Any] | None
) -> tuple[object, Mapping[str, torch.Tensor] | None, Mapping[str, Any] | None]:
    if os.path.isdir(name):
        from tpeft_deploy.exporters.hugging_face import load_directory

        module, own_inputs, own_shapes = load_directory(name)
        return module, inputs or own_inputs, shapes or own_shapes
    module_name, _, function_name = name.partition(":")
    if not function_name or os.path.sep in name:
        raise UnsupportedBase(
            f"load base {name}",
            expected="package.module:factory, or a Hugging Face model directory on this machine",
            got=repr(name),
            fix="ONNX files are not read as bases by this version, and nothing is downloaded.",
        )
    result = _factory(name, module_name, function_name)()
    if isinstance(result, nn.Module):
        return result, inputs, shapes
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UnsupportedBase(
            f"load base {name}",
            expected="the factory to return (module, example_inputs) or (module, example_inputs, dynamic_shapes)",
            got=type(result).__name__,
        )
    module, own_inputs, own_shapes = (*result, None)[:3]
    return module, inputs or own_inputs, shapes or own_shapes


def _factory(name: str, module_name: str, function_name: str) -> Callable[[], object]:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: factories live beside the user's own scripts
    try:
        factory: Callable[[], object] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedBase(
            f"load base {name}",
            expected=f"a callable {function_name!r} in module {module_name!r}",
            got=str(error),
            fix="Run from the directory that holds the module, or install it.",
        ) from error
    return factory


def _check_inputs(name: str, inputs: object) -> Inputs:
    if not isinstance(inputs, Mapping) or not inputs:
        raise UnsupportedBase(
            f"load base {name}",
            expected="example_inputs: a dict of input name -> tensor",
            got="none" if inputs is None else type(inputs).__name__,
            fix="Pass example_inputs={'input name': tensor}, named as the forward method names them.",
        )
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedBase(
                f"load base {name}, input {key!r}", expected="a torch.Tensor", got=type(value).__name__
            )
    return dict(inputs)


def _is_dynamic(shape: object) -> bool:
    if isinstance(shape, Mapping):
        return shape.get(0) is not None
    return isinstance(shape, tuple | list) and bool(shape) and shape[0] is not None


def _two_rows(inputs: Inputs) -> Inputs:
    """At least two rows: the exporter takes a size of 1 for a constant."""
    if any(value.ndim and value.shape[0] == 1 for value in inputs.values()):
        return {key: torch.cat([value, value]) if value.ndim else value for key, value in inputs.items()}
    return inputs
