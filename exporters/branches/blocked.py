"""Depthwise convs for the CPU: W + dW in ONNX Runtime's own channel-blocked layout.

ONNX Runtime gives a conv its fast blocked kernel only when the weight is a constant; one that is fed, or computed as
W + dW, costs six times as much (`benchmarks/depthwise.py`).  Its internal operators do not ask for a constant: a
depthwise weight in their layout is, byte for byte, an image of C channels, so their reordering of images makes it,
whatever block size the CPU has.  They exist on the CPU only, and for channels that are a multiple of 16; graphs that
use them stand beside the portable ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches import weight
from tpeft_deploy.exporters.branches.surgery import add_constant, call, route_around
from tpeft_deploy.exporters.graph.weight_uses import Site, conv_sites, geometry, weight_value

__all__ = ["banked", "can_block", "factored"]

_BLOCK = 16  # the largest block of any CPU: AVX-512's
_NHWC = [0, 2, 3, 1]


def can_block(graph: ir.Graph, targets: Iterable[Target]) -> bool:
    """Whether some target is a depthwise conv that the blocked layout takes."""
    return any(_sites(graph, target) for target in targets if target.kind == "weight")


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Replace depthwise convs by blocked ones; anything else as the portable branch does."""
    sites = _sites(model.graph, target)
    if not sites:
        weight.factored(model, target, slots)
        return
    change = weight.change(model, target, slots)
    for i, site in enumerate(sites):
        inputs = [*_operands(model, target, site), change]
        _replace(model, target, site, "TuckerDepthwise", inputs, f"tucker.{i}")


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Replace depthwise convs by blocked ones that read each row's weight."""
    sites = _sites(model.graph, target)
    if not sites or any(site.order != "major" for site in sites):
        return weight.banked(model, target, slots, index)
    changes = weight.change(model, target, weight.rows_of(model, target, slots, index))
    for i, site in enumerate(sites):
        inputs = [*_operands(model, target, site), index, changes]
        _replace(model, target, site, "BankedDepthwise", inputs, f"banked.{i}")
    return "each"


def _sites(graph: ir.Graph, target: Target) -> list[Site]:
    channels, inputs, *kernel = target.shape
    value = weight_value(graph, target.name)
    if len(kernel) != 2 or inputs != 1 or channels % _BLOCK or value.dtype != ir.DataType.FLOAT:
        return []
    sites = conv_sites(value, grouped=True) or []
    return sites if all(site.node.attributes.get_int("group", 1) == channels for site in sites) else []


def _operands(model: ir.Model, target: Target, site: Site) -> list[ir.Value]:
    bias = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    if bias is None:
        bias = add_constant(model.graph, f"tpeft.zeros.{target.shape[0]}", np.zeros(target.shape[0], target.dtype))
    return [site.x, weight_value(model.graph, target.name), bias]


def _replace(model: ir.Model, target: Target, site: Site, function: str, inputs: list[ir.Value], suffix: str) -> None:
    """Put the function in the conv's place, and in that of a Transpose to channels last if nothing else follows."""
    uses = list(site.y.uses())
    follower = uses[0][0] if len(uses) == 1 and not site.y.is_graph_output() else None
    last = follower is not None and follower.op_type == "Transpose" and _perm(follower) == _NHWC
    old = follower if last and follower is not None else site.node
    attributes = {
        **geometry(site.node, 2),
        "kernel": list(target.shape[2:]),
        "group": target.shape[0],
        "last": int(last),
    }
    new = call(
        model,
        function,
        inputs,
        name=f"{target.name}.{suffix}",
        like=old.outputs[0],
        after=old,
        attributes=attributes,
    )
    route_around(old, new)
    if old is not site.node:
        model.graph.remove(site.node, safe=True)


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))
