"""Stacked experts (E, ..) of which each token picks one: y += up[e] (down[e] x), or (x up[e]) down[e].

transformers writes them so with `experts_implementation="batched_mm"`: a lookup of a matrix per token, then a batched
product.  Banked, a token takes the expert of the adapter of the row that it is in.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches.surgery import call, reroute
from tpeft_deploy.exporters.graph.batch_axes import order_of
from tpeft_deploy.exporters.graph.weight_uses import value_uses, weight_value

__all__ = ["ExpertSite", "banked", "expert_sites", "factored"]

_ROUTED = 3  # axes of an activation of routed tokens: one token an entry, its column or row


class ExpertSite(NamedTuple):
    """A batched product of looked-up experts and tokens: `side` is the expert's side of the token."""

    node: ir.Node
    side: str
    x: ir.Value
    y: ir.Value
    experts: ir.Value


def expert_sites(weight: ir.Value) -> list[ExpertSite]:
    """The uses of a stack of matrices (E, ..) as one looked-up matrix per token; none when it has any other use."""
    sites: list[ExpertSite] = []
    for node, index in value_uses(weight):
        if _is_identity(node):
            found = expert_sites(node.outputs[0])
        elif index == 0 and _is_lookup(node):
            found = _products(node.outputs[0], node.inputs[1])
        else:
            found = []
        if not found:
            return []
        sites += found
    return sites


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach TuckerExperts at every product."""
    for i, site in enumerate(expert_sites(weight_value(model.graph, target.name))):
        inputs = [site.y, site.x, site.experts, slots["up"], slots["down"]]
        name = f"{target.name}.tucker.{i}"
        reroute(site.y, call(model, f"TuckerExperts{site.side}", inputs, name=name, like=site.y, after=site.node))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach BankedExperts at every product; tokens in another order than that of the rows take one adapter per run."""
    sites = expert_sites(weight_value(model.graph, target.name))
    for i, site in enumerate(sites):
        inputs = [site.y, site.x, site.experts, index, slots["up"], slots["down"]]
        name = f"{target.name}.banked.{i}"
        reroute(site.y, call(model, f"BankedExperts{site.side}", inputs, name=name, like=site.y, after=site.node))
    return "each" if all(order_of(site.x) == "major" for site in sites) else "group"


def _products(picked: ir.Value, experts: ir.Value | None) -> list[ExpertSite]:
    sites: list[ExpertSite] = []
    for node, index in value_uses(picked):
        x = node.inputs[1 - index] if node.op_type == "MatMul" else None
        if experts is not None and _is_identity(node):
            found = _products(node.outputs[0], experts)
        elif experts is not None and x is not None and x.shape is not None and len(x.shape) == _ROUTED:
            found = [ExpertSite(node, "Right" if index else "Left", x, node.outputs[0], experts)]
        else:
            found = []
        if not found:
            return []
        sites += found
    return [] if picked.is_graph_output() else sites


def _is_identity(node: ir.Node) -> bool:
    turned = list(node.attributes.get_ints("perm", []))
    return node.op_type == "Transpose" and bool(turned) and turned == sorted(turned)


def _is_lookup(node: ir.Node) -> bool:
    """Whether a node picks whole matrices from a stack by a list of numbers."""
    ids = node.inputs[1] if len(node.inputs) > 1 else None
    if ids is None:
        return False
    if node.op_type == "GatherND":
        # One number an entry: (tokens, 1).  The exporter leaves the shapes of such lists out.
        picked = node.outputs[0].shape
        return node.attributes.get_int("batch_dims", 0) == 0 and (picked is None or len(picked) == _ROUTED)
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 and len(ids.shape or ()) == 1
