"""Models in bfloat16, which neither numpy nor ONNX Runtime's CPU knows.

Inside, the graph computes in bfloat16; what crosses its border is float32: inputs, outputs, and the tensors of
adapters, which are rounded where they enter (a bank: after its row was picked).  The proof runs a float32 copy of the
graph that holds the same bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from tpeft_deploy.tucker import Array

__all__ = ["HALVES", "holds", "narrow", "narrow_gathers", "upcast", "wide", "wide_ports", "widened"]

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BANKS = {"downs", "ups", "cores", "values"}


def holds(graph: ir.Graph) -> bool:
    """Whether a graph has weights in bfloat16."""
    return any(value.dtype == ir.DataType.BFLOAT16 for value in graph.initializers.values())


def wide(tensor: ir.TensorProtocol) -> Array:
    """A tensor as numpy can hold it: bfloat16 becomes float32, exactly."""
    array = tensor.numpy()
    return array.astype(np.float32) if tensor.dtype == ir.DataType.BFLOAT16 else array


def widened(array: Array) -> Array:
    """An input for a copy that computes in float32."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def wide_ports(graph: ir.Graph) -> None:
    """Let inputs and outputs in bfloat16 be float32, with casts behind and before them."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            uses = list(value.uses())
            value.dtype = ir.DataType.FLOAT
            inner = _cast(value, ir.DataType.BFLOAT16, f"{value.name}.bfloat16")
            graph.insert_before(graph[0], _producer(inner))
            for node, index in uses:
                node.replace_input_with(index, inner)
    for index, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            name, value.name = value.name, f"{value.name}.bfloat16"
            outer = _cast(value, ir.DataType.FLOAT, str(name))
            graph.append(_producer(outer))
            graph.outputs[index] = outer


def narrow(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A float32 value of a graph, rounded to bfloat16 before all other nodes."""
    inner = _cast(value, ir.DataType.BFLOAT16, f"{value.name}.bfloat16")
    graph.insert_before(graph[0], _producer(inner))
    return inner


def narrow_gathers(function: ir.Function) -> None:
    """Round what a function picks from its banks to bfloat16."""
    for node in list(function):
        if node.op_type == "Gather" and _source(node.inputs[0]) in _BANKS:
            picked = node.outputs[0]
            inner = _cast(picked, ir.DataType.BFLOAT16, f"{picked.name}_bfloat16")
            uses = [(user, index) for user, index in picked.uses() if user is not _producer(inner)]
            function.insert_after(node, _producer(inner))
            for user, index in uses:
                user.replace_input_with(index, inner)


def upcast(model: ir.Model, narrow: Collection[ir.DataType] = (ir.DataType.BFLOAT16,)) -> None:
    """Turn a model into one that computes in float32 with the same weights, in place.

    Args:
        model: changed, its inputs and outputs included.
        narrow: the dtypes that become float32.
    """
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in parts:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            _upcast_node(node, narrow)
        for value in graph.inputs:
            _upcast_value(value, narrow)
    for value in model.graph.initializers.values():
        own = value.const_value
        if own is not None and own.dtype in narrow:
            value.const_value = ir.tensor(own.numpy().astype(np.float32), name=value.name)
        _upcast_value(value, narrow)


def _upcast_node(node: ir.Node, narrow: Collection[ir.DataType]) -> None:
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.value in narrow:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    constant = node.attributes.get("value")
    if node.op_type in ("Constant", "ConstantOfShape") and constant is not None and constant.value.dtype in narrow:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(constant.value.numpy().astype(np.float32)))
    for value in node.outputs:
        _upcast_value(value, narrow)


def _upcast_value(value: ir.Value, narrow: Collection[ir.DataType]) -> None:
    if value.dtype in narrow:
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a clone shares its types with what it was cloned from


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": to}, name=f"{name}.cast")
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(to)
    node.outputs[0].shape = value.shape.copy() if value.shape is not None else None
    return node.outputs[0]


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError(f"value {value.name!r} is computed by no node")
    return node


def _source(value: ir.Value | None) -> str | None:
    while value is not None and value.producer() is not None:
        node = _producer(value)
        if node.op_type != "Reshape":
            return None
        value = node.inputs[0]
    return value.name if value is not None else None
