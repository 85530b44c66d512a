"""Linear layers on images of a fixed size, for the CPU: W + dW where an image has more positions than that costs.

A branch (x down) up costs P R (I + O) products and a sum of P O numbers for the P positions of a row; W + dW costs
I O R products and a sum of I O numbers, once for all rows that share an adapter.  In a ConvNeXt's first stage P is 3136
and I O / (I + O) is 77.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import call, route_around
from tpeft_deploy.exporters.graph.batch_axes import order_of

__all__ = ["merge"]

_BRANCHES = {"TuckerLinear", "BankedLinear"}


def merge(model: ir.Model) -> None:
    """Replace the branches of linear layers on images of a fixed size, in place, where that is cheaper."""
    for node in list(model.graph):
        y, x = (node.inputs[0], node.inputs[1]) if node.op_type in _BRANCHES else (None, None)
        if y is None or x is None or order_of(x) != "major":
            continue
        sizes = _sizes(y), _sizes(x)
        if sizes[0] is not None and sizes[1] is not None:
            _replace(model, node, (y, sizes[0]), (x, sizes[1]))


def _replace(
    model: ir.Model, node: ir.Node, result: tuple[ir.Value, list[int]], read: tuple[ir.Value, list[int]]
) -> None:
    (y, y_sizes), (x, x_sizes) = result, read
    *slots, down, up = (value for value in node.inputs[2:] if value is not None)
    layer = y.producer()
    inner, outer = x_sizes[-1], y_sizes[-1]
    product = layer is not None and layer.op_type == "MatMul" and layer.inputs[0] is x and len(list(y.uses())) == 1
    merged = product and not y.is_graph_output() and inner * outer <= math.prod(x_sizes[:-1]) * (inner + outer)
    attributes = {"split": [-1, inner], "shape": [-1, *y_sizes]} if slots else {}
    name, like = f"{node.name}.merged", node.outputs[0]
    if merged and layer is not None:
        function, inputs = "BankedMergedLinear" if slots else "MergedLinear", [x, layer.inputs[1], *slots, down, up]
    elif slots:
        function, inputs = "BankedSizedLinear", [y, x, *slots, down, up]
    else:
        return
    given = [value for value in inputs if value is not None]
    route_around(node, call(model, function, given, name=name, like=like, after=node, attributes=attributes))
    if merged and layer is not None:
        model.graph.remove(layer, safe=True)


def _sizes(value: ir.Value) -> list[int] | None:
    """The sizes of a value behind its rows, where all are known and there is an axis between rows and channels."""
    sizes = list(value.shape or ())[1:]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) > 1 else None
