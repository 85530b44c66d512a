"""Whole tensors that a task replaces: a classifier head, a bias, and anything else.

Factored, the initializer becomes one that can be overridden, with its first size free.  Banked, the weight of a
Linear and a bias behind it are read per row; any other tensor is read once per run.
"""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import call, call_first, reroute, route_around
from tpeft_deploy.exporters.targets import Site, gemm_is_linear, linear_sites, value_uses, weight_value
from tpeft_deploy.manifest import Rows
from tpeft_deploy.slots import Target

__all__ = ["banked", "factored"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Route every consumer to the overridable input."""
    weight = weight_value(model.graph, target.name)
    for node, index in list(weight.uses()):
        node.replace_input_with(index, slots["value"])


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Read the tensor per row at Linear weights and biases, once per run elsewhere."""
    weight = weight_value(model.graph, target.name)
    split_gemms(model, weight)
    function, sites = _row_wise(weight, len(target.shape))
    if sites:
        for i, site in enumerate(sites):
            name = f"{target.name}.banked.{i}"
            inputs = [site.x, index, slots["value"]]
            route_around(site.node, call(model, function, inputs, name=name, like=_shapeless(site.y), after=site.node))
        return "each"
    inputs = [index, slots["value"]]
    reroute(weight, call_first(model, "BankedValue", inputs, name=f"{target.name}.banked", like=_shapeless(weight)))
    return "group"


def split_gemms(model: ir.Model, weight: ir.Value) -> None:
    """Turn every Gemm that uses the tensor, as weight or bias, into one without bias and an Add.

    Then each of the two can be replaced without knowing about the other.
    """
    for gemm in {node for node, _ in weight.uses() if node.op_type == "Gemm" and gemm_is_linear(node)}:
        if len(gemm.inputs) < 3 or gemm.inputs[2] is None:
            continue
        y, bias = gemm.outputs[0], gemm.inputs[2]
        product = ir.node("Gemm", gemm.inputs[:2], gemm.attributes, name=f"{gemm.name}.product")
        product.outputs[0].name = f"{gemm.name}.product.out"
        product.outputs[0].type = y.type
        total = ir.Value(name=f"{gemm.name}.sum", shape=y.shape.copy() if y.shape is not None else None, type=y.type)
        add = ir.node("Add", [product.outputs[0], bias], outputs=[total], name=f"{gemm.name}.add")
        model.graph.insert_after(gemm, [product, add])
        route_around(gemm, total)


def _row_wise(weight: ir.Value, axes: int) -> tuple[str, list[Site] | None]:
    """The function that reads a tensor per row, and where; no sites when some use of the tensor fits neither."""
    if axes == 2:
        return "BankedDense", linear_sites(weight)
    return "BankedBias", _bias_sites(weight) if axes == 1 else None


def _bias_sites(bias: ir.Value) -> list[Site] | None:
    """The uses of a bias (C,) as y + bias behind a linear layer, or None when it has any other use."""
    sites = []
    for node, position in value_uses(bias):
        other = node.inputs[1 - position] if node.op_type == "Add" and len(node.inputs) == 2 else None
        producer = other.producer() if other is not None else None
        # Behind a linear layer the last axis is the bias's own; elsewhere an Add may broadcast differently.
        if other is None or producer is None or producer.op_type not in _LINEAR_LIKE:
            return None
        sites.append(Site(node, other, node.outputs[0]))
    return sites


_LINEAR_LIKE = {"MatMul", "Gemm", "TuckerLinear", "BankedLinear", "BankedDense"}


def _shapeless(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type)
