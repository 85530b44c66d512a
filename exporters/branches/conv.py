"""Convolutions with groups = 1, plain and transposed: a 1x1 conv, the core with the base's geometry, a 1x1 conv.

One of the 1x1 convs is absent where adapters hold the core with that mode whole, as LoRA's `down` does.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target, slots_of
from tpeft_deploy.exporters.branches.surgery import add_constant, call, reroute
from tpeft_deploy.exporters.graph.weight_uses import (
    Site,
    conv_sites,
    geometry,
    one_hot_window,
    transposed_conv_sites,
    weight_value,
)

__all__ = ["banked", "factored"]

_ALL = 3  # down, core, up
_USUAL_RANK = 8


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach a Tucker conv at every consumer."""
    for i, site in enumerate(_sites(model, target)):
        inputs = [site.y, site.x, *slots.values()]
        reroute(site.y, _attach(model, target, site, f"Tucker{_function(target)}", inputs, f"tucker.{i}"))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach the banked form at every consumer."""
    sites = _sites(model, target)
    for i, site in enumerate(sites):
        function = f"Banked{_function(target)}"
        sums = target.kind == "conv" and "down" not in slots
        if sums and _reads_patches(target, site):
            function, sums = f"{function}Patches", False
        inputs = [site.y, site.x, index, *slots.values(), _window(model, target, sums=sums)]
        reroute(site.y, _attach(model, target, site, function, inputs, f"banked.{i}"))
    return "each" if all(site.order == "major" for site in sites) else "group"


def _reads_patches(target: Target, site: Site) -> bool:
    """Whether the patches of all input channels are fewer numbers than the taps of a usual rank's channels."""
    return target.shape[1] <= _USUAL_RANK * math.prod(geometry(site.node, len(target.shape) - 2)["strides"])


def _window(model: ir.Model, target: Target, *, sums: bool) -> ir.Value:
    """The one-hot window (K, 1, *K) of a kernel, or (1, K, *K) where it sums taps; equal kernels share one."""
    kernel = target.shape[2:]
    dtype = weight_value(model.graph, target.name).const_value.dtype.numpy()  # type: ignore[union-attr]
    window, name = one_hot_window(kernel).astype(dtype), "tpeft.window"
    if sums:
        window, name = window.swapaxes(0, 1), f"{name}.sum"
    name = f"{name}.{'x'.join(map(str, kernel))}.{dtype.name}"
    return add_constant(model.graph, name, np.ascontiguousarray(window))


def _function(target: Target) -> str:
    names = [slot.name for slot in slots_of(target)]
    only = "" if len(names) == _ALL else "Up" if "up" in names else "Down"
    return f"{'Conv' if target.kind == 'conv' else 'ConvTranspose'}{only}"


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
