"""Constants and sizes that a model computes.

Elementary functions of constants, such as the frequencies of a timestep embedding, are folded: two libraries round exp
differently in the last bit.  A timestep of 1000 makes up to 6e-5 rad of that in the argument of the sin and cos that
follow, which can be more than everything else in an export.  So these constants are computed by torch, as the model
computes them, and written into the graph.

A Range plus a size, the positions behind a cache, becomes a Range that starts there: on CUDA the size, computed on the
CPU, would be copied to the device in the middle of the run, and no CUDA graph could be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

from tpeft_deploy.tucker import Array

__all__ = ["fold_functions", "shift_ranges"]

_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "Cos": torch.cos,
    "Exp": torch.exp,
    "Log": torch.log,
    "Pow": torch.pow,
    "Sin": torch.sin,
    "Tanh": torch.tanh,
}
# What leads to them, rounded alike everywhere.
_EXACT = {"Add", "Cast", "Constant", "Div", "Mul", "Neg", "Range", "Reshape", "Sqrt", "Sub", "Unsqueeze"}
# What computes sizes of sizes, on the CPU whatever the provider is.
_OF_SIZES = {"Add", "Cast", "Concat", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"}


def fold_functions(model: ir.Model) -> None:
    """Replace each elementary function of constants alone by the value that torch gives it.

    Weights are no constants: adapters change them.
    """
    known: dict[ir.Value, Array] = {}
    opsets = dict(model.opset_imports)
    for node in list(model.graph):
        operands = [value for value in node.inputs if value is not None]
        if node.domain or not all(value in known for value in operands):
            continue
        output, arrays = node.outputs[0], [known[value] for value in operands]
        if node.op_type in _EXACT:
            known[output] = _evaluate(node, arrays, opsets)
        elif node.op_type in _FUNCTIONS and arrays[0].dtype.kind == "f" and not output.is_graph_output():
            known[output] = _compute(node.op_type, arrays)
            constant = ir.node("Constant", [], {"value": ir.tensor(known[output])})
            constant.outputs[0].shape, constant.outputs[0].type = output.shape, output.type
            model.graph.insert_before(node, constant)
            output.replace_all_uses_with(constant.outputs[0])
            known[constant.outputs[0]] = known[output]
    passes.RemoveUnusedNodesPass()(model)


def _compute(function: str, arrays: Sequence[Array]) -> Array:
    result: Array = _FUNCTIONS[function](*(torch.from_numpy(np.array(array)) for array in arrays)).numpy()
    return result.astype(arrays[0].dtype)


def _evaluate(node: ir.Node, arrays: Sequence[Array], opsets: dict[str, int]) -> Array:
    proto = ir.to_proto(node)
    named = [name for name in proto.input if name]
    outputs: Any = ReferenceEvaluator(proto, opsets=opsets).run(None, dict(zip(named, arrays, strict=True)))
    return np.asarray(outputs[0])


def shift_ranges(graph: ir.Graph) -> None:
    """Let a Range to which a size is added start at that size, in place."""
    for node in list(graph):
        steps = [value.producer() for value in node.inputs if value is not None] if node.op_type == "Add" else []
        place = next((i for i, step in enumerate(steps) if step is not None and step.op_type == "Range"), None)
        size = node.inputs[1 - place] if place is not None else None
        if place is None or size is None or size.shape is None or size.shape.rank() or not _is_size(size):
            continue
        start, limit, delta = steps[place].inputs  # type: ignore[union-attr]
        ends = [ir.node("Add", [end, size], name=f"{node.name}.{i}") for i, end in enumerate((start, limit))]
        shifted = ir.node("Range", [*(end.outputs[0] for end in ends), delta], name=f"{node.name}.range")
        for new in (*ends, shifted):
            new.outputs[0].name = f"{new.name}.out"
            new.outputs[0].type = size.type
        shifted.outputs[0].shape = node.outputs[0].shape
        graph.insert_before(node, [*ends, shifted])
        node.outputs[0].replace_all_uses_with(shifted.outputs[0])


def _is_size(value: ir.Value) -> bool:
    """Whether a value is computed from the sizes of others and constants alone."""
    node = value.producer()
    if node is None:
        return value.const_value is not None and not value.is_graph_input()
    if node.op_type in {"Shape", "Size", "Constant"}:
        return True
    return node.op_type in _OF_SIZES and all(_is_size(other) for other in node.inputs if other is not None)
