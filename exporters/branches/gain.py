"""Gains (DoRA, IA3): one factor per index of a weight's first or second mode, gain * (W + dW).

At a product the factors of one mode scale what comes out, before the bias; those of the other what goes in.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches.split import split_bias
from tpeft_deploy.exporters.branches.surgery import apply, call, reroute
from tpeft_deploy.exporters.graph.weight_uses import Site, conv_sites, linear_sites, transposed_conv_sites, weight_value

__all__ = ["banked", "can_scale", "factored"]

Side = Literal["x", "y"]


def can_scale(weight: ir.Value, mode: int) -> bool:
    """Whether factors along a mode of the weight can be applied at every one of its uses."""
    sites = _sites(weight)
    return bool(sites) and all(_side(site, mode) is not None and _rank(site, mode) for site in sites)


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Multiply what comes out of every consumer, or what goes into it."""
    for site, side, value, tail in _places(model, target):
        name = f"{target.name}.gain.{value.name}"
        inputs = [value, slots["value"]]
        after = site.node if side == "y" else value.producer()
        new = call(model, "TuckerGain", inputs, name=name, like=value, after=after, attributes={"shape": tail})
        _use(site, side, new)


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Multiply by each row's own factors."""
    rows: Rows = "each"
    for site, side, value, tail in _places(model, target):
        axes = len(value.shape) if value.shape is not None else len(tail) + 1
        own = [1] * (axes - 1 - len(tail)) + tail
        after = site.node if side == "y" else value.producer()
        inputs = [value, index, slots["value"]]
        name = f"{target.name}.gain.{value.name}"
        attributes = {"tail": own}
        vector = call(model, "BankedVector", inputs, name=name, like=None, after=after, attributes=attributes)
        scaled = apply(model, "Mul", [value, vector], like=value, after=vector.producer())
        _use(site, side, scaled, keep=vector.producer())
        if site.order != "major":
            rows = "group"
    return rows


def _places(model: ir.Model, target: Target) -> list[tuple[Site, Side, ir.Value, list[int]]]:
    """Every use: the site, which side of it is scaled, that value, and how the factors are laid out against it."""
    weight, mode = weight_value(model.graph, target.name), int(target.kind[-1])
    for site in _sites(weight):
        if _side(site, mode) == "y":
            split_bias(model, site.node)
    tail = [-1] + [1] * (len(target.shape) - 2)
    found: list[tuple[Site, Side, ir.Value, list[int]]] = []
    for site in _sites(weight):
        side = _side(site, mode)
        if side is not None:
            found.append((site, side, site.x if side == "x" else site.y, tail))
    return found


def _sites(weight: ir.Value) -> list[Site]:
    if len(weight.shape or ()) == 2:
        return linear_sites(weight) or []
    return conv_sites(weight, grouped=False) or transposed_conv_sites(weight, grouped=False) or []


def _side(site: Site, mode: int) -> Side | None:
    if site.use == "lookup":
        return "y" if mode == 1 else None
    outputs = 0 if site.use == "linear" or site.node.op_type == "Conv" else 1
    return "y" if mode == outputs else "x"


def _rank(site: Site, mode: int) -> bool:
    value = site.x if _side(site, mode) == "x" else site.y
    return value.shape is not None


def _use(site: Site, side: Side, new: ir.Value, *, keep: ir.Node | None = None) -> None:
    if side == "y":
        reroute(site.y, new, keep=keep)
    else:
        site.node.replace_input_with(0, new)
