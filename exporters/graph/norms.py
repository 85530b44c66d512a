"""Root mean square norms in the form that ONNX Runtime fuses.

A norm divides by the root; exporters of torch multiply by the reciprocal.  ONNX Runtime computes norms that divide with
one kernel (SimplifiedLayerNormalization) instead of seven.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["divide_norms"]


def divide_norms(graph: ir.Graph) -> None:
    """Replace x * (1 / sqrt(mean(x^2) + epsilon)) by a quotient, in place, where the fusion is exact."""
    for square in list(graph):
        way = _way(square)
        if not way or not _is_exact(way):
            continue
        _, mean, total, root, reciprocal, product = way
        epsilon = _other(total, mean.outputs[0])
        for position, value in enumerate((mean.outputs[0], epsilon)):
            total.replace_input_with(position, value)
        y = product.outputs[0]
        quotient = ir.node("Div", [square.inputs[0], root.outputs[0]], name=f"{product.name}.quotient")
        quotient.outputs[0].shape, quotient.outputs[0].type = y.shape, y.type
        y.replace_all_uses_with(quotient.outputs[0])
        graph.insert_before(product, quotient)
        graph.remove([product, reciprocal], safe=True)
        quotient.outputs[0].name = y.name


def _way(square: ir.Node) -> list[ir.Node]:
    """The nodes from x^2 to the product; none where they are others or have other users."""
    way = [square] if square.op_type == "Pow" and _number(square.inputs[1]) == 2 else []
    for step in ("ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul"):
        node = _user(way[-1]) if way else None
        fits = node is not None and (node.op_type == step or (step == "Reciprocal" and _is_reciprocal(node)))
        way = [*way, node] if node is not None and fits else []
    return way


def _is_exact(way: list[ir.Node]) -> bool:
    """Whether ONNX Runtime fuses the norm to what it is.

    It takes an epsilon that is not float32 for 1e-5, and any vector for the scale; it does not look for further users
    of the quotient.
    """
    square, mean, total, _, reciprocal, product = way
    x, epsilon = square.inputs[0], _other(total, mean.outputs[0])
    scaled = _user(product)
    scaled = _user(scaled) if scaled is not None and scaled.op_type == "Cast" else scaled
    if x is None or not x.shape or _other(product, reciprocal.outputs[0]) is not x or scaled is None:
        return False
    known = _number(epsilon) is not None and epsilon is not None and epsilon.dtype == ir.DataType.FLOAT
    last = _number(mean.inputs[1] if len(mean.inputs) > 1 else None) in {-1, len(x.shape) - 1}
    vectors = [value for value in scaled.inputs if value is not None and value.shape is not None]
    fits = scaled.op_type == "Mul" and any(list(value.shape or ()) == [x.shape[-1]] for value in vectors)
    return known and last and mean.attributes.get_int("keepdims", 1) == 1 and fits


def _user(node: ir.Node) -> ir.Node | None:
    """The only user of a node's output."""
    output = node.outputs[0]
    users = [] if output.is_graph_output() else [user for user, _ in output.uses()]
    return users[0] if len(users) == 1 else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a node with two."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _is_reciprocal(node: ir.Node) -> bool:
    return node.op_type == "Div" and _number(node.inputs[0]) == 1


def _number(value: ir.Value | None) -> float | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None and not value.is_graph_input() else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None
