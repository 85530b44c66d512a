"""Matrices: y += (x down) up at every product, and (up^T)[ids] down^T at every lookup, that uses the weight.

The kinds linear (y = x W^T, W[ids]) and matmul (y = x W) differ in their slots only.
"""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches import tiled
from tpeft_deploy.exporters.branches.surgery import call, reroute
from tpeft_deploy.exporters.branches.tiled import repeated
from tpeft_deploy.exporters.graph.weight_uses import Site, linear_sites, weight_value

__all__ = ["banked", "factored"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach TuckerLinear or TuckerLookup at every consumer."""
    for i, site in enumerate(linear_sites(weight_value(model.graph, target.name)) or []):
        function = "TuckerLookup" if site.use == "lookup" else "TuckerLinear"
        inputs = [site.y, site.x, slots["down"], slots["up"]]
        name = f"{target.name}.tucker.{i}"
        reroute(site.y, call(model, function, inputs, name=name, like=site.y, after=site.node))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach BankedLinear or BankedLookup, in the form that the order of the rows asks for, at every consumer."""
    rows: Rows = "each"
    for i, site in enumerate(linear_sites(weight_value(model.graph, target.name)) or []):
        name = f"{target.name}.banked.{i}"
        found = repeated(site) if site.order == "shared" and site.use != "lookup" else None
        if found is not None:
            tiled.attach(model, target, site, found, slots, index, name)
            continue
        function, own = _form(site)
        inputs = [site.y, site.x, index, slots["down"], slots["up"]]
        reroute(site.y, call(model, function, inputs, name=name, like=site.y, after=site.node))
        rows = "each" if rows == own == "each" else "group"
    return rows


def _form(site: Site) -> tuple[str, Rows]:
    function = "BankedLookup" if site.use == "lookup" else "BankedLinear"
    if site.order == "major":
        return function, "each"
    if site.order == "minor" and site.use != "lookup":
        return f"{function}Minor", "each"
    shape = site.y.shape
    if site.order == "shared" and shape is not None and len(shape) == 3 and shape[0] == 1:
        return f"{function}Shared", "each"
    # Exact for one adapter per run whatever the order is.
    return function, "group"
