"""A torch module as a base: traced once, raw, and run itself as the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import UnsupportedBase, brief
from tpeft_deploy.exporters.bases import dotted_names
from tpeft_deploy.exporters.causes import cause_of, said_by
from tpeft_deploy.exporters.graph.constants import fold_functions
from tpeft_deploy.exporters.oracle.base import Base, Inputs, Outputs
from tpeft_deploy.exporters.oracle.bfloat16 import wide_ports
from tpeft_deploy.exporters.oracle.quiet import quiet
from tpeft_deploy.exporters.resizing import resize, tables
from tpeft_deploy.formats.read import base_view
from tpeft_deploy.ties import Ties, changed_names
from tpeft_deploy.tucker import Array

__all__ = ["OPSET", "TorchBase", "output_names"]

OPSET = 20
SUFFIX = "_out"  # of an output with the name of an input or a weight: ONNX has one space of names
BFLOAT16_OPSET = 22  # the first with convolutions in it

_DTYPES = {
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
    torch.bool,
}


_BATCHED_EXPERTS = "Call model.set_experts_implementation('batched_mm'): grouped products have no operator in ONNX."
_HALVES = {torch.float16, torch.bfloat16}


class TorchBase(Base):
    """A torch module with what is needed to trace and run it.

    Args:
        name: for messages and as the default name of a bundle.
        module: in whatever mode it is; it is traced and run in evaluation mode and left as it was.
        inputs: example inputs by name.
        dynamic_shapes: as `torch.export` takes them, by input name.

    Raises:
        UnsupportedBase: a weight has a dtype that cannot be exported.
    """

    module: nn.Module

    def __init__(
        self, name: str, module: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_shapes: Mapping[str, Any]
    ) -> None:
        super().__init__(name, {key: _array(value) for key, value in inputs.items()})
        self._dtypes = {key: value.dtype for key, value in inputs.items()}
        self.module = module
        self.dynamic_shapes = dynamic_shapes
        self._check_dtypes()

    @property
    def weights(self) -> dict[str, Array]:
        """Every parameter and buffer by every name it has; no copies on the CPU, but for bfloat16 as float32."""
        return {name: _array(tensor) for name, tensor in self._named().items()}

    @property
    def aliases(self) -> dict[str, str]:
        """Every name of a parameter or buffer -> the first name of the same parameter of the same module."""
        first: dict[object, str] = {}
        holders = base_view.holders(self.module)
        return {name: first.setdefault(holders.get(name, name), name) for name in self._named()}

    @property
    def ties(self) -> Ties:
        """Tensors that several modules hold: for each, a name in every module."""
        named, groups = self._named(), dict[int, list[str]]()
        for name in dict.fromkeys(self.aliases.values()):
            groups.setdefault(id(named[name]), []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @property
    def view(self) -> nn.Module:
        """The module itself."""
        return self.module

    @property
    def vocabulary(self) -> frozenset[str]:
        """The names of the input embedding and of the head, weights and biases, of a transformers model."""
        own = {id(tensor) for table in tables(self.module) for tensor in table.parameters()}
        return frozenset(name for name, tensor in self._named().items() if id(tensor) in own)

    def resized(self, rows: int) -> Base:
        """The same with a copy of the module that has so many tokens."""
        other = copy(self)
        other.module = resize(self.module, rows, self.name)
        return other

    def with_module(self, module: nn.Module) -> Base:
        """The same with another module."""
        other = copy(self)
        other.module = module
        return other

    @property
    def batched(self) -> bool:
        """Whether some input's first axis is dynamic."""
        return any(_is_dynamic(self.dynamic_shapes.get(name)) for name in self.inputs)

    def reference(self, adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
        """Run the module with the merged tensors in place of the base's; a 16-bit module in float32."""
        own, aliases = self._named(), self.aliases
        half = any(tensor.dtype in _HALVES for tensor in own.values())
        changed = changed_names(adapter) if adapter is not None else []
        merged = {aliases[name]: torch.from_numpy(self.merged(adapter, name)) for name in changed if adapter}
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        if half:
            # Its own rounding, at every layer, is no part of what an export is measured by.
            merged = {name: _wide(merged.get(name, own[name])) for name in dict.fromkeys(aliases.values())}
            tensors = {name: _wide(tensor) for name, tensor in tensors.items()}
        with self._evaluating() as module:
            outputs = functional_call(module, merged, (), dotted_names.nest(tensors), tie_weights=False)
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        return {name: tensor.numpy() for name, tensor in zip(names, leaves, strict=True)}

    def in_both(self, inputs: Inputs, names: Sequence[str]) -> tuple[Outputs, Outputs]:
        """The module's forward as it is, on the CPU, and in float32.

        Raises:
            UnsupportedBase: torch has no kernel of an operator in these 16 bits for the CPU.
        """
        tensors = {name: torch.from_numpy(np.array(value)).to(self._dtypes[name]) for name, value in inputs.items()}
        own = {name: tensor.cpu() for name, tensor in self._named().items()}
        try:
            with self._evaluating() as module:
                outputs = functional_call(module, own, (), dotted_names.nest(tensors), tie_weights=False)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedBase(
                f"run {self.name} in 16 bits on the CPU", problem=f"torch fails ({said_by(error)})"
            ) from error
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        narrow = {name: _array(leaf) for name, leaf in zip(names, leaves, strict=True)}
        return narrow, self.reference(None, inputs, names)

    def graph(self) -> ir.Model:
        """Export the module: every weight keeps its name and value, nothing is optimised.

        Modules that share a tensor get an initializer each, so that an adapter can change one of them alone.
        """
        inputs = {name: torch.from_numpy(np.array(value)).to(self._dtypes[name]) for name, value in self.inputs.items()}
        bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in self._named().values())
        with self._evaluating() as module, _untied(module), quiet():
            outputs = self._run(module, inputs)
            try:
                program = torch.onnx.export(
                    module,
                    args=(),
                    kwargs=dotted_names.nest(inputs),
                    dynamo=True,
                    optimize=False,
                    dynamic_shapes=dotted_names.nest(self.dynamic_shapes),
                    opset_version=BFLOAT16_OPSET if bfloat16 else OPSET,
                    verbose=False,
                )
            except Exception as error:  # the exporter raises every kind of exception; the cause is kept
                cause = cause_of(error)
                fix = _BATCHED_EXPERTS if "grouped_mm" in str(error) else cause.fix
                raise UnsupportedBase(f"export base {self.name}", problem=cause.problem, fix=fix) from error
        if program is None:
            raise UnsupportedBase(f"export base {self.name}", problem="the torch exporter returned no program")
        dotted_names.restore(program.model.graph, self.inputs)
        _name_outputs(self.name, program.model.graph, output_names(outputs))
        _drop_made_up_biases(program.model)
        fold_functions(program.model)
        wide_ports(program.model.graph)
        return program.model

    def _run(self, module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> object:
        try:
            return module(**dotted_names.nest(inputs))
        except Exception as error:  # models raise every kind of exception; the cause is kept
            takes = ", ".join(inspect.signature(module.forward).parameters)
            given = ", ".join(f"{name} {_dtype(tensor)}{list(tensor.shape)}" for name, tensor in inputs.items())
            raise UnsupportedBase(
                f"run base {self.name}",
                problem=f"the model's forward fails on the example inputs ({said_by(error)})",
                got=brief(given),
                fix=f"Give example_inputs that forward({brief(takes)}) accepts, by its parameters' names.",
            ) from error

    def _named(self) -> dict[str, torch.Tensor]:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return {**parameters, **dict(self.module.named_buffers(remove_duplicate=False))}

    def _check_dtypes(self) -> None:
        for name, tensor in self._named().items():
            if is_lazy(tensor) or tensor.device.type != "cpu":
                where = "uninitialised" if is_lazy(tensor) else f"on device {tensor.device}"
                raise UnsupportedBase(
                    f"load base {self.name}, weight {name!r}",
                    expected="values in the CPU's memory",
                    got=f"a tensor {where}{', which has none' if tensor.is_meta else ''}",
                    fix="Load the trained weights, and call module.to('cpu').",
                )
        for name, tensor in self.module.state_dict().items():
            if tensor.dtype not in _DTYPES:
                raise UnsupportedBase(
                    f"load base {self.name}, weight {name!r}",
                    expected="float32, float16, bfloat16, float64, integers or booleans",
                    got=_dtype(tensor),
                    fix="Convert the module with .float() or .half().",
                )

    @contextmanager
    def _evaluating(self) -> Iterator[nn.Module]:
        """The module in evaluation mode without gradients; every submodule's mode is put back."""
        modes = [(module, module.training) for module in self.module.modules()]
        try:
            with torch.no_grad():
                yield self.module.eval()
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _untied(module: nn.Module) -> Iterator[None]:
    """Let no two modules hold one tensor: further ones get another tensor on the same memory, and theirs back."""
    seen: set[int] = set()
    replaced = []
    try:
        for owner in module.modules():
            for held in cast("list[dict[str, Any]]", [owner._parameters, owner._buffers]):
                for name, tensor in held.items():
                    if tensor is not None and id(tensor) in seen:
                        replaced.append((held, name, tensor))
                        own = tensor.detach()
                        held[name] = nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own
                    seen.add(id(tensor))
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


def output_names(outputs: object) -> list[str]:
    """Names of a module's outputs: a mapping's keys, else `output`, or `output_0`, `output_1`, ...

    A key that holds several tensors (past key values) gets one name each, `key_0`, `key_1`, ...
    In the graph a name that an input or a weight has already gets the suffix `_out`: `sample` goes in, `sample_out`
    comes out.
    """
    if isinstance(outputs, Mapping):
        named = [(str(key), _count(value)) for key, value in outputs.items()]
    else:
        named = [("output", _count(outputs))]
    return [name if count == 1 else f"{name}_{i}" for name, count in named for i in range(count)]


def _count(value: object) -> int:
    return sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _name_outputs(base: str, graph: ir.Graph, names: list[str]) -> None:
    if len(names) != len(graph.outputs):
        raise UnsupportedBase(
            f"export base {base}",
            expected=f"{len(names)} tensor outputs, as the module returns",
            got=f"{len(graph.outputs)} in the graph",
        )
    taken = {value.name: value for node in graph for value in node.outputs}
    held = {str(value.name) for value in graph.inputs} | set(graph.initializers)
    for value, own in zip(graph.outputs, names, strict=True):
        name = own
        while name in held or (name != own and name in names):
            name += SUFFIX
        other = taken.get(name)
        if other is not None and other is not value:
            other.name = f"{name}.inner"
        value.name = name


def _drop_made_up_biases(model: ir.Model) -> None:
    """Remove the zeros that the exporter gives a Conv3d without a bias for one, in a shape that nothing accepts."""
    for node in model.graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and bias.producer() is not None and bias.producer().op_type == "Expand":  # type: ignore[union-attr]
            node.resize_inputs(2)
    passes.RemoveUnusedNodesPass()(model)


def _array(tensor: torch.Tensor) -> Array:
    own = tensor.detach().cpu()
    array: Array = (own.float() if own.dtype == torch.bfloat16 else own).numpy()
    return array


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor


def _is_dynamic(shape: object) -> bool:
    if isinstance(shape, Mapping):
        return shape.get(0) is not None
    return isinstance(shape, tuple | list) and bool(shape) and shape[0] is not None
