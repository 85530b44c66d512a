"""Every other use of a weight: W + dW in the graph.  Grouped and depthwise convs (whose dW is tiny) live here too.

Banked, a conv runs row by row with that row's own weight; any other use takes one adapter per run.
"""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import call, call_first, reroute, route_around
from tpeft_deploy.exporters.targets import conv_sites, geometry, weight_value
from tpeft_deploy.manifest import Rows
from tpeft_deploy.slots import Target

__all__ = ["banked", "factored"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Route every consumer to W + dW."""
    weight = weight_value(model.graph, target.name)
    inputs = [weight, slots["up"], slots["core"]]
    reroute(weight, call_first(model, "TuckerWeight", inputs, name=f"{target.name}.tucker", like=weight))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Replace convs by row-wise convs where every consumer is one, else route consumers to one W + dW."""
    weight = weight_value(model.graph, target.name)
    sites = conv_sites(weight, grouped=True) if len(target.shape) > 2 else None
    if not sites:
        inputs = [weight, index, slots["up"], slots["core"]]
        reroute(weight, call_first(model, "BankedWeight", inputs, name=f"{target.name}.banked", like=weight))
        return "group"
    for i, site in enumerate(sites):
        groups = site.node.attributes.get_int("group", 1)
        new = call(
            model,
            "BankedGroupedConv",
            [site.x, weight, index, slots["up"], slots["core"]],
            name=f"{target.name}.banked.{i}",
            like=site.y,
            after=site.node,
            attributes=geometry(site.node, len(target.shape) - 2) | {"group": groups},
        )
        bias = site.node.inputs[2] if len(site.node.inputs) > 2 else None
        if bias is not None:
            new = _add_bias(model, site.node, new, bias, axes=len(target.shape) - 2)
        route_around(site.node, new)
    return "each"


def _add_bias(model: ir.Model, conv: ir.Node, y: ir.Value, bias: ir.Value, *, axes: int) -> ir.Value:
    """y + bias along axis 1; BankedGroupedConv is bias-free because its Scan body sees one row only."""
    name = f"{conv.name}.bias"
    shape = ir.node("Constant", [], {"value_ints": [-1] + [1] * axes}, name=f"{name}.shape")
    column = ir.node("Reshape", [bias, shape.outputs[0]], name=f"{name}.column")
    total = ir.Value(name=f"{name}.out", shape=y.shape.copy() if y.shape is not None else None, type=y.type)
    add = ir.node("Add", [y, column.outputs[0]], outputs=[total], name=name)
    after = y.producer()
    model.graph.insert_after(after if after is not None else conv, [shape, column, add])
    return total
