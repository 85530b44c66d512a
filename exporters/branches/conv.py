"""Convolutions with groups = 1, plain and transposed: a 1x1 conv, the core with the base's geometry, a 1x1 conv.

One of the 1x1 convs is absent where adapters hold the core with that mode whole, as LoRA's `down` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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

__all__ = ["banked", "factored", "mirrored_pads", "window"]

_ALL = 3  # down, core, up
_USUAL_RANK = 8
_PLANE = 2  # axes of an image


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Attach a Tucker conv at every consumer."""
    for i, site in enumerate(_sites(model, target)):
        inputs, function = [site.y, site.x, *slots.values()], f"Tucker{_function(target)}"
        attributes = geometry(site.node, len(target.shape) - 2)
        reroute(site.y, _attach(model, target, site, function, inputs, f"tucker.{i}", attributes))


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Attach the banked form at every consumer."""
    sites = _sites(model, target)
    dtype = weight_value(model.graph, target.name).const_value.dtype  # type: ignore[union-attr]
    for i, site in enumerate(sites):
        function, attributes = f"Banked{_function(target)}", geometry(site.node, len(target.shape) - 2)
        inputs = [site.y, site.x, index, *slots.values()]
        sums = target.kind == "conv" and "down" not in slots
        if sums and dtype == ir.DataType.FLOAT and (pads := _col2im_pads(target.shape[2:], attributes)):
            function = f"{function}Col2Im"
            attributes = {"pads": pads, "dilations": attributes["dilations"]}
        else:
            if sums and _reads_patches(target, site):
                function, sums = f"{function}Patches", False
            inputs.append(window(model, target.shape[2:], dtype, sums=sums))
        reroute(site.y, _attach(model, target, site, function, inputs, f"banked.{i}", attributes))
    return "each" if all(site.order == "major" for site in sites) else "group"


def _reads_patches(target: Target, site: Site) -> bool:
    """Whether the patches of all input channels are fewer numbers than the taps of a usual rank's channels."""
    return target.shape[1] <= _USUAL_RANK * math.prod(geometry(site.node, len(target.shape) - 2)["strides"])


def _col2im_pads(kernel: Sequence[int], attributes: Mapping[str, Sequence[int]]) -> list[int] | None:
    """The pads with which Col2Im adds a conv's taps where they belong; None where it cannot."""
    # With one or three axes ONNX Runtime 1.32 adds some taps elsewhere.
    if set(attributes["strides"]) != {1} or len(kernel) != _PLANE:
        return None
    pads = mirrored_pads(kernel, attributes["dilations"], attributes["pads"])
    return pads if min(pads) >= 0 else None


def mirrored_pads(kernel: Sequence[int], dilations: Sequence[int], pads: Sequence[int]) -> list[int]:
    """(K - 1) dilation - pad for each side of each axis: pads of the conv that is mirrored, and the other way round."""
    spans = [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)]
    return [span - pad for span, pad in zip([*spans, *spans], pads, strict=True)]


def window(model: ir.Model, kernel: Sequence[int], dtype: ir.DataType, *, sums: bool) -> ir.Value:
    """The one-hot window (K, 1, *K) of a kernel, or (1, K, *K) where it sums taps; equal kernels share one."""
    array, name = one_hot_window(kernel).astype(dtype.numpy()), "tpeft.window"
    if sums:
        array, name = array.swapaxes(0, 1), f"{name}.sum"
    name = f"{name}.{'x'.join(map(str, kernel))}.{dtype.numpy().name}"
    return add_constant(model.graph, name, np.ascontiguousarray(array))


def _function(target: Target) -> str:
    names = [slot.name for slot in slots_of(target)]
    only = "" if len(names) == _ALL else "Up" if "up" in names else "Down"
    return f"{'Conv' if target.kind == 'conv' else 'ConvTranspose'}{only}"


def _sites(model: ir.Model, target: Target) -> list[Site]:
    weight = weight_value(model.graph, target.name)
    found = (conv_sites if target.kind == "conv" else transposed_conv_sites)(weight, grouped=False)
    return found or []


def _attach(
    model: ir.Model,
    target: Target,
    site: Site,
    function: str,
    inputs: list[ir.Value],
    suffix: str,
    attributes: Mapping[str, Sequence[int]],
) -> ir.Value:
    return call(
        model,
        function,
        inputs,
        name=f"{target.name}.{suffix}",
        like=site.y,
        after=site.node,
        attributes=attributes,
    )
