"""Linear layers: y += (x down) up at every Gemm and MatMul that uses the weight."""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import call, reroute
from tpeft_deploy.exporters.targets import linear_sites, weight_value
from tpeft_deploy.manifest import Rows
from tpeft_deploy.slots import Target

__all__ = ["banked", "factored"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach TuckerLinear at every consumer."""
    for i, site in enumerate(linear_sites(weight_value(model.graph, target.name)) or []):
        inputs = [site.y, site.x, slots["down"], slots["up"]]
        name = f"{target.name}.tucker.{i}"
        reroute(site.y, call(model, "TuckerLinear", inputs, name=name, like=site.y, after=site.node))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach BankedLinear at every consumer."""
    for i, site in enumerate(linear_sites(weight_value(model.graph, target.name)) or []):
        inputs = [site.y, site.x, index, slots["down"], slots["up"]]
        name = f"{target.name}.banked.{i}"
        reroute(site.y, call(model, "BankedLinear", inputs, name=name, like=site.y, after=site.node))
    return "each"
