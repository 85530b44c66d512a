"""Taking nodes apart that do several things at once, so that each can be changed without knowing about the others.

A Gemm or a conv with a bias becomes the product and an Add; a norm becomes the bare norm, a Mul and an Add.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import add_constant, apply, constant_ints, route_around
from tpeft_deploy.exporters.graph.batch_axes import same_order

__all__ = ["split_bias", "split_norm"]

_CONVS = {"Conv", "ConvTranspose"}


def split_bias(model: ir.Model, node: ir.Node) -> None:
    """Turn a Gemm or a conv with a bias into one without it and an Add; any other node stays."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or node.op_type not in {"Gemm", *_CONVS}:
        return
    y = node.outputs[0]
    product = ir.node(node.op_type, node.inputs[:2], node.attributes, name=f"{node.name}.product")
    product.outputs[0].name = f"{node.name}.product.out"
    product.outputs[0].type, product.outputs[0].shape = y.type, y.shape.copy() if y.shape is not None else None
    same_order(product.outputs[0], y)
    model.graph.insert_after(node, product)
    column = bias
    if node.op_type in _CONVS:
        axes = len(node.inputs[1].shape) - 2  # type: ignore[union-attr, arg-type]
        column = apply(model, "Reshape", [bias, constant_ints(model, [-1, *[1] * axes])], like=None, after=product)
    total = apply(model, "Add", [product.outputs[0], column], like=y, after=column.producer() or product)
    route_around(node, total)


def split_norm(model: ir.Model, node: ir.Node) -> None:
    """Turn a LayerNormalization into the bare norm, a Mul and an Add; a BatchNormalization into its arithmetic."""
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) == -1:
        _split_layer_norm(model, node)
    elif node.op_type == "BatchNormalization" and len(node.outputs) == 1:
        _split_batch_norm(model, node)


def _split_layer_norm(model: ir.Model, node: ir.Node) -> None:
    x, scale, *rest = node.inputs
    if x is None or scale is None or scale.const_value is None:
        return
    y = node.outputs[0]
    ones = add_constant(model.graph, f"tpeft.ones.{scale.name}", np.ones_like(scale.const_value.numpy()))
    bare = apply(model, "LayerNormalization", [x, ones], like=y, after=node, attributes=node.attributes)
    total = apply(model, "Mul", [bare, scale], like=y, after=bare.producer())
    if rest and rest[0] is not None:
        total = apply(model, "Add", [total, rest[0]], like=y, after=total.producer())
    route_around(node, total)


def _split_batch_norm(model: ir.Model, node: ir.Node) -> None:
    x, scale, bias, mean, variance = node.inputs
    y = node.outputs[0]
    if x is None or scale is None or bias is None or mean is None or variance is None or x.shape is None:
        return
    column = constant_ints(model, [-1, *[1] * (len(x.shape) - 2)])
    dtype = variance.const_value.numpy().dtype if variance.const_value is not None else None
    if dtype is None:
        return
    epsilon = add_constant(
        model.graph, f"tpeft.epsilon.{variance.name}", np.array([node.attributes.get_float("epsilon", 1e-5)], dtype)
    )
    after: ir.Node | None = node
    columns = []
    for parameter in (mean, variance, scale, bias):
        columns.append(apply(model, "Reshape", [parameter, column], like=None, after=after))
        after = columns[-1].producer()
    centred = apply(model, "Sub", [x, columns[0]], like=y, after=after)
    shifted = apply(model, "Add", [columns[1], epsilon], like=None, after=centred.producer())
    deviation = apply(model, "Sqrt", [shifted], like=None, after=shifted.producer())
    normed = apply(model, "Div", [centred, deviation], like=y, after=deviation.producer())
    scaled = apply(model, "Mul", [normed, columns[2]], like=y, after=normed.producer())
    route_around(node, apply(model, "Add", [scaled, columns[3]], like=y, after=scaled.producer()))
