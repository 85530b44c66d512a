"""Convolutions with groups = 1, plain and transposed: a 1x1 conv, the core with the base's geometry, a 1x1 conv."""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import add_constant, call, reroute
from tpeft_deploy.exporters.sites import (
    Site,
    conv_sites,
    geometry,
    one_hot_window,
    transposed_conv_sites,
    weight_value,
)
from tpeft_deploy.manifest import Rows
from tpeft_deploy.slots import Target

__all__ = ["banked", "factored"]


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach TuckerConv or TuckerConvTranspose at every consumer."""
    for i, site in enumerate(_sites(model, target)):
        inputs = [site.y, site.x, slots["down"], slots["core"], slots["up"]]
        function = "TuckerConv" if target.kind == "conv" else "TuckerConvTranspose"
        reroute(site.y, _attach(model, target, site, function, inputs, f"tucker.{i}"))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach the banked form at every consumer; equal kernels share one window constant."""
    kernel = target.shape[2:]
    dtype = weight_value(model.graph, target.name).const_value.dtype.numpy()  # type: ignore[union-attr]
    window = one_hot_window(kernel).astype(dtype)
    name = f"tpeft.window.{'x'.join(map(str, kernel))}.{dtype.name}"
    taps = add_constant(model.graph, name, window)
    sites = _sites(model, target)
    for i, site in enumerate(sites):
        inputs = [site.y, site.x, index, slots["down"], slots["core"], slots["up"], taps]
        function = "BankedConv" if target.kind == "conv" else "BankedConvTranspose"
        reroute(site.y, _attach(model, target, site, function, inputs, f"banked.{i}"))
    return "each" if all(site.order == "major" for site in sites) else "group"


def _sites(model: ir.Model, target: Target) -> list[Site]:
    weight = weight_value(model.graph, target.name)
    found = (conv_sites if target.kind == "conv" else transposed_conv_sites)(weight, grouped=False)
    return found or []


def _attach(
    model: ir.Model, target: Target, site: Site, function: str, inputs: list[ir.Value], suffix: str
) -> ir.Value:
    return call(
        model,
        function,
        inputs,
        name=f"{target.name}.{suffix}",
        like=site.y,
        after=site.node,
        attributes=geometry(site.node, len(target.shape) - 2),
    )
