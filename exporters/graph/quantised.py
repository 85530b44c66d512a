"""Layers with weights in 8 or 4 bits: branches attach to their inputs and outputs.

A product is recognised as MatMulNBits (of ONNX Runtime), or as a MatMul of the output of a DequantizeLinear.  Once
its weight is identified, the node says so itself, in metadata that a saved graph keeps: the name, the shape, and the
digest of the weight that was quantised.  The DequantizeLinear of a kernel says the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from tpeft_deploy.tucker import Array

__all__ = ["dequantise", "held_digest", "name_of", "nodes_of", "operands", "products", "replace", "stand_in", "tag"]

_NAME, _SHAPE, _DIGEST = "tpeft.weight", "tpeft.shape", "tpeft.digest"
_TURNED = "tpeft.turned"
_NODES = "tpeft.nodes"


def products(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that multiply by a quantised matrix."""
    for node in graph:
        if node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and _dequantiser(node) is not None):
            yield node


def operands(graph: ir.Graph) -> list[str]:
    """The initializers that hold quantised weights, their scales and zero points."""
    names = []
    for node in graph:
        if node.op_type in {"MatMulNBits", "DequantizeLinear"}:
            names += [str(v.name) for v in node.inputs if v is not None and v.const_value is not None]
    return names


def tag(node: ir.Node, name: str, shape: tuple[int, ...], digest: str, *, turned: bool = True) -> None:
    """Name the weight of a product.

    Args:
        node: the product, or the DequantizeLinear of a kernel.
        name: the weight.
        shape: shape of the weight.
        digest: digest of the weight that was quantised.
        turned: whether the weight is (O, I), turned where the product uses it, rather than (I, O).
    """
    if not turned:
        node.metadata_props[_TURNED] = "no"
    node.metadata_props[_NAME] = name
    node.metadata_props[_SHAPE] = ",".join(map(str, shape))
    node.metadata_props[_DIGEST] = digest


def name_of(node: ir.Node) -> str | None:
    """The weight that a product holds, if it was identified."""
    return node.metadata_props.get(_NAME)


def nodes_of(weight: ir.Value) -> list[ir.Node]:
    """The products that a stand-in stands for."""
    nodes: list[ir.Node] = weight.meta.get(_NODES, [])
    return nodes


def held_digest(graph: ir.Graph, name: str) -> str:
    """Digest of the weight that was quantised."""
    return _tagged(graph, name)[0].metadata_props[_DIGEST]


def stand_in(graph: ir.Graph, name: str) -> ir.Value:
    """A value of a quantised weight's name, shape and dtype, for a graph that has no such initializer.

    Raises:
        KeyError: no product holds the weight.
    """
    nodes = _tagged(graph, name)
    shape = [int(size) for size in nodes[0].metadata_props[_SHAPE].split(",")]
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_dtype(nodes[0])))
    value.meta[_NODES] = nodes
    return value


def dequantise(node: ir.Node) -> Array:
    """The weight that a node computes with, as tagged, else (O, I): ONNX Runtime's answer to the unit vectors."""
    if node.op_type == "DequantizeLinear":
        return _decoded(node)
    from tpeft_deploy.exporters.oracle import compare

    chain = _chain(node)
    inputs = _inputs(node, chain)
    x = ir.Value(name="x", shape=ir.Shape([inputs, inputs]), type=ir.TensorType(_dtype(node)))
    copies: dict[int, ir.Value] = {}
    nodes: list[ir.Node] = []
    for own in chain:
        # Neither a bias of MatMulNBits nor what the layer really gets.
        kept = own.inputs[:5] if own is node else own.inputs
        values = [x if own is node and i == 0 else _copied(value, copies) for i, value in enumerate(kept)]
        copy = ir.node(own.op_type, values, own.attributes, domain=own.domain)
        copy.outputs[0].name = f"value.{len(nodes)}"
        copy.outputs[0].type = ir.TensorType(_dtype(node))
        copies[id(own.outputs[0])] = copy.outputs[0]
        nodes.append(copy)
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, name="dequantise", opset_imports=_opsets(node))
    for value in copies.values():
        if value.const_value is not None:
            graph.register_initializer(value)
    with TemporaryDirectory() as place:
        file = Path(place) / "dequantise.onnx"
        ir.save(ir.Model(graph, ir_version=10), file, external_data="dequantise.data")
        session = compare.open_session(file)
        (answer,) = compare.run(session, {"x": np.eye(inputs, dtype=_dtype(node).numpy())}, {}).values()
    return np.ascontiguousarray(answer.T if _turned(node) else answer)


def replace(node: ir.Node, weight: Array) -> None:
    """Let a product, or a convolution, use a weight in floating point instead, in the layout of `dequantise`."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"node {node.name!r} stands in no graph")
    name = f"{name_of(node)}.in.floating.point.{node.name}"
    kernel = node.op_type == "DequantizeLinear"
    own = weight if kernel or not _turned(node) else weight.T
    tensor = ir.tensor(np.ascontiguousarray(own, dtype=_dtype(node).numpy()), name=name)
    matrix = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(matrix)
    if kernel:
        node.outputs[0].replace_all_uses_with(matrix)
        graph.remove(node, safe=True)
        return
    if node.op_type == "MatMul":
        node.replace_input_with(1, matrix)
        return
    y = node.outputs[0]
    product = ir.node("MatMul", [node.inputs[0], matrix], name=f"{node.name}.float")
    product.outputs[0].name, product.outputs[0].type = f"{node.name}.float.out", y.type
    nodes, new = [product], product.outputs[0]
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        total = ir.node("Add", [new, node.inputs[5]], name=f"{node.name}.bias")
        total.outputs[0].name, total.outputs[0].type = f"{node.name}.bias.out", y.type
        nodes, new = [product, total], total.outputs[0]
    graph.insert_after(node, nodes)
    for user, index in list(y.uses()):
        user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = new
            y.name, new.name = f"{y.name}.quantised", y.name
    graph.remove(node, safe=True)


def _tagged(graph: ir.Graph, name: str) -> list[ir.Node]:
    nodes = [node for node in graph if name_of(node) == name]
    if not nodes:
        raise KeyError(name)
    return nodes


def _dequantiser(node: ir.Node) -> ir.Node | None:
    """The node that makes the matrix of a MatMul from a constant in few bits, perhaps through a Transpose."""
    producer = node.inputs[1].producer() if node.inputs[1] is not None else None
    if producer is not None and producer.op_type == "Transpose":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    held = producer.inputs[0]
    return producer if held is not None and held.const_value is not None else None


def _turned(node: ir.Node) -> bool:
    return _TURNED not in node.metadata_props


def _decoded(node: ir.Node) -> Array:
    codes, scales = (value.const_value.numpy() for value in node.inputs[:2] if value is not None and value.const_value)
    wide: Array = codes.astype(np.float32) * scales.reshape(-1, *[1] * (codes.ndim - 1))
    return wide


def _chain(node: ir.Node) -> list[ir.Node]:
    first = _dequantiser(node) if node.op_type == "MatMul" else None
    if first is None:
        return [node]
    between = node.inputs[1].producer()  # type: ignore[union-attr]
    return [first, node] if between is first or between is None else [first, between, node]


def _inputs(node: ir.Node, chain: list[ir.Node]) -> int:
    if node.op_type == "MatMulNBits":
        return int(node.attributes.get_int("K", 0))
    sizes = chain[0].inputs[0].const_value.shape.numpy()  # type: ignore[union-attr]
    return sizes[1] if len(chain) == 3 else sizes[0]


def _dtype(node: ir.Node) -> ir.DataType:
    scales = node.inputs[2] if node.op_type == "MatMulNBits" else _chain(node)[0].inputs[1]
    if scales is None or scales.const_value is None:
        return ir.DataType.FLOAT
    return scales.const_value.dtype


def _copied(value: ir.Value | None, copies: dict[int, ir.Value]) -> ir.Value | None:
    if value is None:
        return None
    if id(value) not in copies:
        copies[id(value)] = ir.Value(
            name=str(value.name), shape=value.shape, type=value.type, const_value=value.const_value
        )
    return copies[id(value)]


def _opsets(node: ir.Node) -> dict[str, int]:
    graph = node.graph
    own = dict(graph.opset_imports) if isinstance(graph, ir.Graph) else {}
    return {"": own.get("", 21), "com.microsoft": 1}
