"""A linear layer on a table that all rows share; its result is laid out anew and then repeated for every row.

DeBERTa projects its relative positions (1, L, I) this way.  Rows of different adapters have different results, so the
change is computed per adapter, taken through the same layout, and added where the repeated result is complete.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches.surgery import apply, call, constant_ints, reroute
from tpeft_deploy.exporters.graph.weight_uses import Site

__all__ = ["LAYOUT", "Repeated", "attach", "repeated"]

LAYOUT = {"Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


class Repeated(NamedTuple):
    """The nodes that lay a shared result out anew, and the one that repeats it for every row."""

    layout: list[ir.Node]
    tile: ir.Node


def repeated(site: Site) -> Repeated | None:
    """The nodes after a site, when they are a bias, a new layout and a repetition that nothing else uses on the way."""
    layout: list[ir.Node] = []
    value = site.y
    while True:
        uses = [(node, index) for node, index in value.uses() if node.op_type != "Shape"]
        if len(uses) != 1 or value.is_graph_output():
            return None
        node, index = uses[0]
        if node.op_type == "Tile" and index == 0:
            shape = node.outputs[0].shape
            return Repeated(layout, node) if shape is not None and len(shape) == 3 else None
        if node.op_type in LAYOUT and index == 0:
            layout.append(node)
        elif node.op_type != "Add" or _is_computed(node.inputs[1 - index]):
            return None
        value = node.outputs[0]


def attach(
    model: ir.Model, target: Target, site: Site, found: Repeated, slots: dict[str, ir.Value], index: ir.Value, name: str
) -> None:
    """Add each row's own change behind the repetition."""
    inputs = [site.x, index, slots["down"], slots["up"]]
    change = call(model, "BankedShared", inputs, name=f"{name}.change", like=None, after=found.tile)
    change.type = site.y.type
    laid_out = apply(
        model,
        "Scan",
        [change],
        like=None,
        after=change.producer(),
        attributes={"body": _body(model, found.layout, change, name), "num_scan_inputs": 1},
    )
    y = found.tile.outputs[0]
    reroute(y, call(model, "BankedRepeated", [y, laid_out], name=name, like=y, after=laid_out.producer() or found.tile))


def _body(model: ir.Model, layout: list[ir.Node], change: ir.Value, name: str) -> ir.Graph:
    """The layout of one adapter's change: (L, O) -> as the base's own (1, L, O) is laid out."""
    axis = constant_ints(model, [0])
    row = ir.Value(name=f"{name}.row", type=change.type)
    nodes = [ir.node("Unsqueeze", [row, axis], name=f"{name}.unsqueeze")]
    for i, original in enumerate(layout):
        inputs = [nodes[-1].outputs[0], *original.inputs[1:]]
        nodes.append(ir.node(original.op_type, inputs, original.attributes, name=f"{name}.layout.{i}"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].type = change.type
    return ir.Graph([row], [nodes[-1].outputs[0]], nodes=nodes, name=f"{name}.body")


def _is_computed(value: ir.Value | None) -> bool:
    return value is None or value.const_value is None
