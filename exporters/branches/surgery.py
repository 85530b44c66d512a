"""The few edits that every branch is made of: new inputs, function calls, and re-routed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.branches.functions.banked import BANKED
from tpeft_deploy.exporters.branches.functions.col2im import COL2IM
from tpeft_deploy.exporters.branches.functions.conv import CONVS
from tpeft_deploy.exporters.branches.functions.factored import BLOCKS, DOMAIN, FACTORED, MICROSOFT
from tpeft_deploy.exporters.branches.functions.merged import MERGED
from tpeft_deploy.exporters.branches.functions.windowed import WINDOWED
from tpeft_deploy.exporters.graph.batch_axes import same_order
from tpeft_deploy.exporters.oracle import bfloat16

__all__ = [
    "add_constant",
    "add_input",
    "apply",
    "call",
    "call_first",
    "constant_ints",
    "reroute",
    "resemble",
    "route_around",
]

_FUNCTIONS = FACTORED | BANKED | COL2IM | CONVS | MERGED | WINDOWED


def add_input(
    graph: ir.Graph, name: str, shape: Sequence[int | str], dtype: ir.DataType, default: ir.TensorProtocol | None = None
) -> ir.Value:
    """A new graph input; with a default it is an overridable initializer."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=default)
    graph.inputs.append(value)
    if default is not None:
        graph.register_initializer(value)
    return value


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer that nobody can override; the one of that name, if it is there already."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant_ints(model: ir.Model, numbers: Sequence[int]) -> ir.Value:
    """A constant list of integers, shared between equal requests."""
    name = f"tpeft.ints.{'x'.join(map(str, numbers))}"
    return add_constant(model.graph, name, np.array(numbers, np.int64))


def apply(
    model: ir.Model,
    op_type: str,
    inputs: Sequence[ir.Value],
    *,
    like: ir.Value | None,
    after: ir.Node | None,
    attributes: Mapping[str, object] | None = None,
) -> ir.Value:
    """Insert a standard operator behind a node, or before all others when that is None.

    Args:
        like: a value that the result resembles in shape, type and order of rows; None when that is not known.
    """
    node = ir.node(op_type, inputs, attributes or {})  # type: ignore[arg-type]
    resemble(node.outputs[0], like)
    _insert(model, node, after)
    node.outputs[0].name = f"tpeft.{op_type}.{_count(model)}"
    node.name = f"{node.outputs[0].name}.node"
    return node.outputs[0]


def call(
    model: ir.Model,
    function: str,
    inputs: Sequence[ir.Value],
    *,
    name: str,
    like: ir.Value | None,
    after: ir.Node | None,
    attributes: Mapping[str, object] | None = None,
) -> ir.Value:
    """Insert a call of one of our functions behind a node, or before all others when that is None.

    Args:
        name: name of the new node.
        like: a value that the result resembles in shape, type and order of rows; None when that is not known.
    """
    node = _node(model, function, inputs, name, like, attributes)
    _insert(model, node, after)
    return node.outputs[0]


def call_first(
    model: ir.Model, function: str, inputs: Sequence[ir.Value], *, name: str, like: ir.Value | None
) -> ir.Value:
    """Insert a call of one of our functions, of inputs, initializers and casts of them, before all other nodes."""
    node = _node(model, function, inputs, name, like, None)
    casts = {id(value.producer()) for value in inputs if value.producer() is not None}
    after = None
    for other in model.graph:
        if id(other) in casts:
            casts.remove(id(other))
            after = other
        if not casts:
            break
    _insert(model, node, after)
    return node.outputs[0]


def _insert(model: ir.Model, node: ir.Node, after: ir.Node | None) -> None:
    if after is not None:
        model.graph.insert_after(after, node)
    else:
        model.graph.insert_before(model.graph[0], node)


def reroute(old: ir.Value, new: ir.Value, *, keep: ir.Node | None = None) -> None:
    """Let every user of `old` except the producer of `new`, and `keep`, use `new`; a graph output keeps its name."""
    producer = new.producer()
    for node, index in list(old.uses()):
        if node is not producer and node is not keep:
            node.replace_input_with(index, new)
    graph = producer.graph if producer is not None else None
    if graph is None:
        return
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
            old.name, new.name = f"{old.name}.base", old.name


def route_around(node: ir.Node, new: ir.Value) -> None:
    """Let every user of a node's only output use `new` instead, and remove the node."""
    old = node.outputs[0]
    name = old.name
    reroute(old, new)
    if new.name == name:
        old.name = f"{name}.gone"
    if node.graph is not None:
        node.graph.remove(node, safe=True)


def _node(
    model: ir.Model,
    function: str,
    inputs: Sequence[ir.Value],
    name: str,
    like: ir.Value | None,
    attributes: Mapping[str, object] | None,
) -> ir.Node:
    definition = _FUNCTIONS[function]
    key = (DOMAIN, function, "")
    if key not in model.functions:
        model.functions[key] = ir.serde.deserialize_function(definition.to_function_proto())
        if bfloat16.holds(model.graph):
            bfloat16.narrow_gathers(model.functions[key])
        # Nothing that the functions use has changed since the opset they were written for.
        model.functions[key].opset_imports[""] = model.graph.opset_imports.get("", 20)
        model.graph.opset_imports[DOMAIN] = 1
        for domain in (BLOCKS, MICROSOFT):
            if domain in model.functions[key].opset_imports:
                model.graph.opset_imports[domain] = 1
    output = resemble(ir.Value(name=f"{name}.out"), like)
    return ir.node(function, inputs, attributes or {}, domain=DOMAIN, outputs=[output], name=name)  # type: ignore[arg-type]


def resemble(new: ir.Value, like: ir.Value | None) -> ir.Value:
    """Give a value the shape, type and order of rows of another; return it."""
    if like is not None:
        new.shape = like.shape.copy() if like.shape is not None else None
        new.type = like.type
        same_order(new, like)
    return new


def _count(model: ir.Model) -> int:
    """A number that no earlier call for this model got."""
    count = int(model.graph.meta.get(_COUNTER, 0))
    model.graph.meta[_COUNTER] = count + 1
    return count


_COUNTER = "tpeft.count"
