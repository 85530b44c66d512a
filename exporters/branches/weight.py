"""Every other use of a weight: W + dW in the graph.  Grouped and depthwise convs (whose dW is tiny) live here too.

Banked, a conv runs row by row with that row's own weight; any other use takes one adapter per run.
"""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches.split import split_bias
from tpeft_deploy.exporters.branches.surgery import call, call_first, reroute, route_around
from tpeft_deploy.exporters.sites import Site, conv_sites, geometry, transposed_conv_sites, weight_value
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
    sites = _conv_sites(weight, len(target.shape))
    if not sites or any(site.order != "major" for site in sites):
        inputs = [weight, index, slots["up"], slots["core"]]
        reroute(weight, call_first(model, "BankedWeight", inputs, name=f"{target.name}.banked", like=weight))
        return "group"
    for site in sites:
        split_bias(model, site.node)  # the body of the Scan sees one row only
    for i, site in enumerate(_conv_sites(weight, len(target.shape)) or []):
        transposed = site.node.op_type == "ConvTranspose"
        new = call(
            model,
            "BankedGroupedConvTranspose" if transposed else "BankedGroupedConv",
            [site.x, weight, index, slots["up"], slots["core"]],
            name=f"{target.name}.banked.{i}",
            like=site.y,
            after=site.node,
            attributes=geometry(site.node, len(target.shape) - 2) | {"group": site.node.attributes.get_int("group", 1)},
        )
        route_around(site.node, new)
    return "each"


def _conv_sites(weight: ir.Value, axes: int) -> list[Site] | None:
    if axes < 3:
        return None
    return conv_sites(weight, grouped=True) or transposed_conv_sites(weight, grouped=True)
