"""Convolutions with groups = 1: a 1x1 conv, the core conv with the base's geometry, a 1x1 conv."""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import add_constant, call, reroute
from tpeft_deploy.exporters.targets import conv_sites, geometry, one_hot_window, weight_value
from tpeft_deploy.manifest import Rows
from tpeft_deploy.slots import Target

__all__ = ["banked", "factored"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach TuckerConv at every consumer."""
    for i, site in enumerate(conv_sites(weight_value(model.graph, target.name), grouped=False) or []):
        inputs = [site.y, site.x, slots["down"], slots["core"], slots["up"]]
        new = call(
            model,
            "TuckerConv",
            inputs,
            name=f"{target.name}.tucker.{i}",
            like=site.y,
            after=site.node,
            attributes=geometry(site.node, len(target.shape) - 2),
        )
        reroute(site.y, new)


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach BankedConv at every consumer; equal kernels share one window constant."""
    kernel = target.shape[2:]
    window = one_hot_window(kernel).astype(target.dtype)
    name = f"tpeft.window.{'x'.join(map(str, kernel))}.{target.dtype}"
    taps = add_constant(model.graph, name, window)
    for i, site in enumerate(conv_sites(weight_value(model.graph, target.name), grouped=False) or []):
        inputs = [site.y, site.x, index, slots["down"], slots["core"], slots["up"], taps]
        new = call(
            model,
            "BankedConv",
            inputs,
            name=f"{target.name}.banked.{i}",
            like=site.y,
            after=site.node,
            attributes=geometry(site.node, len(kernel)),
        )
        reroute(site.y, new)
    return "each"
