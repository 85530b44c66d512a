"""Every other use of a weight: W + dW in the graph.  Grouped and depthwise convs, with a tiny dW, are here too.

Banked, a conv runs row by row with that row's own weight; any other use takes one adapter per run.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches.split import split_bias
from tpeft_deploy.exporters.branches.surgery import call, call_first, reroute, route_around
from tpeft_deploy.exporters.graph.weight_uses import Site, conv_sites, geometry, transposed_conv_sites, weight_value

__all__ = ["banked", "change", "factored", "rows_of"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Route every consumer to W + dW."""
    weight = weight_value(model.graph, target.name)
    inputs = [weight, change(model, target, slots)]
    reroute(weight, call_first(model, "TuckerWeight", inputs, name=f"{target.name}.tucker", like=weight))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Replace convs by row-wise convs where every consumer is one, else route consumers to one W + dW."""
    weight = weight_value(model.graph, target.name)
    changes = change(model, target, rows_of(model, target, slots, index))
    sites = _conv_sites(weight, len(target.shape))
    if not sites or any(site.order != "major" for site in sites):
        inputs = [weight, changes]
        reroute(weight, call_first(model, "BankedWeight", inputs, name=f"{target.name}.banked", like=weight))
        return "group"
    for site in sites:
        split_bias(model, site.node)  # the body of the Scan sees one row only
    for i, site in enumerate(_conv_sites(weight, len(target.shape)) or []):
        transposed = site.node.op_type == "ConvTranspose"
        new = call(
            model,
            "BankedGroupedConvTranspose" if transposed else "BankedGroupedConv",
            [site.x, weight, index, changes],
            name=f"{target.name}.banked.{i}",
            like=site.y,
            after=site.node,
            attributes={
                **geometry(site.node, len(target.shape) - 2),
                "group": site.node.attributes.get_int("group", 1),
                "kernel_shape": target.shape[2:],
            },
        )
        route_around(site.node, new)
    return "each"


def change(model: ir.Model, target: Target, slots: Mapping[str, ir.Value]) -> ir.Value:
    """The flat change (.., O, I K1 ..) of slots, computed before all other nodes."""
    core = slots["core"]
    for slot, function in (("down", "TuckerInputs"), ("up", "TuckerChange")):
        if slot in slots:
            core = _first(model, target, function, [slots[slot], core], slot)
    return core


def rows_of(model: ir.Model, target: Target, slots: Mapping[str, ir.Value], index: ir.Value) -> dict[str, ir.Value]:
    """Every slot's bank rows (N, ...) of this run's adapters."""
    return {slot: _first(model, target, "BankedRows", [index, bank], f"{slot}.rows") for slot, bank in slots.items()}


def _first(model: ir.Model, target: Target, function: str, inputs: list[ir.Value], suffix: str) -> ir.Value:
    value = call_first(model, function, inputs, name=f"{target.name}.{suffix}", like=None)
    value.type = weight_value(model.graph, target.name).type
    return value


def _conv_sites(weight: ir.Value, axes: int) -> list[Site] | None:
    if axes < 3:
        return None
    return conv_sites(weight, grouped=True) or transposed_conv_sites(weight, grouped=True)
