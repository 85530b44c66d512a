"""Uses of a weight in a graph that a branch can attach to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from tpeft_deploy.errors import UnsupportedTarget
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.graph.batch_axes import AxisOrder, order_of

__all__ = [
    "Site",
    "UseKind",
    "conv_sites",
    "geometry",
    "linear_sites",
    "one_hot_window",
    "transposed_conv_sites",
    "value_uses",
    "vector_sites",
    "weight_value",
]

UseKind = Literal["linear", "matmul", "lookup", "conv", "vector"]

_VECTOR_OPS = {"Add", "Mul"}


@dataclass(frozen=True)
class Site:
    """One use of a weight: `node` computes `y` from the activation `x`.

    Args:
        node: the consumer.
        use: linear is y = x W^T, matmul y = x W, lookup y = W[x], conv any convolution, vector y = x + W or x * W
            along the last axis.
        x: the other operand, which carries the batch.
        y: output of the node.
    """

    node: ir.Node
    use: UseKind
    x: ir.Value
    y: ir.Value

    @property
    def order(self) -> AxisOrder:
        """Place of the batch in `x`."""
        return order_of(self.x)


def weight_value(graph: ir.Graph, name: str) -> ir.Value:
    """The initializer that holds a resolved weight; a value that stands for it where the weight is quantised."""
    return graph.initializers[name] if name in graph.initializers else quantised.stand_in(graph, name)


def value_uses(weight: ir.Value) -> list[tuple[ir.Node, int]]:
    """The uses of a weight's values; the exporter asks the shape of some (a Conv3d without bias), which stays."""
    return [(node, index) for node, index in weight.uses() if node.op_type != "Shape"]


def linear_sites(weight: ir.Value) -> list[Site] | None:
    """The uses of a matrix in products and lookups, or None when it has any other use."""
    sites = [_site(node, "linear") for node in quantised.nodes_of(weight)]
    for node, index in value_uses(weight):
        found = _matrix_sites(node, index)
        if found is None:
            return None
        sites += found
    return sites


def conv_sites(weight: ir.Value, *, grouped: bool) -> list[Site] | None:
    """The uses of a weight (O, I / groups, K1, ...) as a Conv kernel, or None when it has any other use.

    Args:
        weight: the initializer.
        grouped: whether convs with groups > 1 count.
    """
    return _kernel_sites(weight, "Conv", grouped=grouped)


def transposed_conv_sites(weight: ir.Value, *, grouped: bool) -> list[Site] | None:
    """The uses of a weight (I, O / groups, K1, ...) as a ConvTranspose kernel, or None when it has any other use."""
    return _kernel_sites(weight, "ConvTranspose", grouped=grouped)


def vector_sites(parameter: ir.Value) -> list[Site] | None:
    """The uses of a vector (C,), or one of shape (1, .., C), as x + v or x * v along x's last axis, or None."""
    size = parameter.shape[-1] if parameter.shape else None
    if not isinstance(size, int) or math.prod(parameter.shape.numpy()) != size:  # type: ignore[union-attr]
        return None
    sites = []
    for node, index in value_uses(parameter):
        if node.op_type not in _VECTOR_OPS or len(node.inputs) != 2:
            return None
        x = node.inputs[1 - index]
        fits = x is not None and x.shape is not None and len(x.shape) >= len(parameter.shape or ())
        if x is None or not fits or x.shape[-1] != size or x.const_value is not None:  # type: ignore[index]
            return None
        sites.append(Site(node, "vector", x, node.outputs[0]))
    return sites


def geometry(node: ir.Node, kernel_axes: int) -> dict[str, list[int]]:
    """A convolution's strides, pads and dilations, with ONNX's defaults filled in; transposed, its output padding."""
    attributes = {
        "strides": list(node.attributes.get_ints("strides", [1] * kernel_axes)),
        "pads": list(node.attributes.get_ints("pads", [0] * (2 * kernel_axes))),
        "dilations": list(node.attributes.get_ints("dilations", [1] * kernel_axes)),
    }
    if node.op_type == "ConvTranspose":
        attributes["output_padding"] = list(node.attributes.get_ints("output_padding", [0] * kernel_axes))
    return attributes


def one_hot_window(kernel: Iterable[int]) -> np.ndarray:
    """The conv weight (K, 1, *kernel) that copies each of the K = K1 K2 .. taps into a separate channel."""
    kernel = tuple(kernel)
    taps = math.prod(kernel)
    return np.eye(taps).reshape(taps, 1, *kernel)


def _matrix_sites(node: ir.Node, index: int) -> list[Site] | None:
    if node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0:
        ids = node.inputs[1]
        return [Site(node, "lookup", ids, node.outputs[0])] if ids is not None else None
    if node.op_type == "MatMul" and index == 1:
        return [_site(node, "matmul")]
    if node.op_type == "Gemm" and index == 1 and _unscaled(node):
        return [_site(node, "linear" if node.attributes.get_int("transB", 0) else "matmul")]
    if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]:
        turned = node.outputs[0]
        if turned.is_graph_output() or any(n.op_type != "MatMul" or i != 1 for n, i in turned.uses()):
            return None
        return [_site(n, "linear") for n, _ in turned.uses()]
    return None


def _kernel_sites(weight: ir.Value, op_type: str, *, grouped: bool) -> list[Site] | None:
    sites = []
    for node, index in value_uses(weight):
        if node.op_type != op_type or index != 1 or "output_shape" in node.attributes:
            return None
        groups = node.attributes.get_int("group", 1)
        padding = node.attributes.get_string("auto_pad", "NOTSET")
        if padding != "NOTSET" or (groups != 1 and not grouped):
            return None
        sites.append(_site(node, "conv"))
    return sites


def _unscaled(gemm: ir.Node) -> bool:
    attributes = gemm.attributes
    scales = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    return scales == (1.0, 1.0) and attributes.get_int("transA", 0) == 0


def _site(node: ir.Node, use: UseKind) -> Site:
    x, y = node.inputs[0], node.outputs[0]
    if x is None:
        raise UnsupportedTarget(f"attach a branch to node {node.name!r}", problem="its first input is missing")
    return Site(node, use, x, y)
