"""From weight names to the initializers that hold them and the nodes that use them.

Resolution is by name AND value, on the raw graph only: after an optimiser has run, an initializer may keep its name
and hold other values (a conv with its BatchNorm folded in), and a branch there would be silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import UnknownTarget, UnsupportedTarget
from tpeft_deploy.slots import Kind, Target

__all__ = [
    "Site",
    "conv_sites",
    "gemm_is_linear",
    "geometry",
    "held_by",
    "linear_sites",
    "one_hot_window",
    "plan",
    "plan_all",
    "resolve",
    "value_uses",
    "weight_value",
]


@dataclass(frozen=True)
class Site:
    """One use of a weight: `node` computes `y` from the activation `x`."""

    node: ir.Node
    x: ir.Value
    y: ir.Value


def resolve(graph: ir.Graph, weights: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> dict[str, str]:
    """Check every initializer that carries a weight's name against the weight's value.

    Args:
        graph: a raw export.
        weights: every weight of the base by every name it has, tied ones included.
        aliases: every such name -> one name for all aliases of the same tensor.

    Returns:
        Weight name -> name of the initializer that holds it; a weight that the graph does not use is absent.

    Raises:
        UnsupportedTarget: an initializer has a weight's name and another value.
    """
    held: dict[str, str] = {}
    for name, value in graph.initializers.items():
        if name not in weights or value.const_value is None:
            continue
        if not np.array_equal(value.const_value.numpy(), weights[name]):
            raise UnsupportedTarget(
                f"resolve weight {name!r} in the exported graph",
                expected="the initializer to hold the weight's own values",
                got="other values under the same name",
                fix="Give the module itself or a raw export (optimize=False).",
            )
        held[aliases[name]] = name
    return {name: held[alias] for name, alias in aliases.items() if alias in held}


def held_by(resolved: Mapping[str, str], name: str, *, doing: str) -> str:
    """The initializer that holds a weight.

    Raises:
        UnknownTarget: the weight is in the base but not in its graph.
    """
    if name not in resolved:
        raise UnknownTarget(
            f"{doing}, weight {name!r}",
            expected="a weight that the forward pass uses",
            got="one that is not in the exported graph",
            fix="Leave its module out of target_modules and modules_to_save.",
        )
    return resolved[name]


def plan(graph: ir.Graph, adapters: Mapping[str, Adapter], resolved: Mapping[str, str], *, base: str) -> list[Target]:
    """The targets of a set of adapters, with the kind that every consumer of each weight allows.

    Raises:
        UnknownTarget: a weight that an adapter changes is in the base but not in its graph.
        UnsupportedTarget: an adapter has gains, which no branch applies yet.
    """
    for task, adapter in adapters.items():
        for name in adapter.gains:
            raise UnsupportedTarget(
                f"export adapter {task!r} for {base}, weight {name!r}",
                expected="a change that a branch adds",
                got="a gain (DoRA, IA3), which multiplies the weight",
                fix="Export it folded: 'tpeft-deploy export folded'.",
            )
    targets: dict[tuple[str, bool], Target] = {}
    for task, adapter in adapters.items():
        for name, whole in [(n, False) for n in adapter.deltas] + [(n, True) for n in adapter.served_overrides]:
            key = (held_by(resolved, name, doing=f"export adapter {task!r} for {base}"), whole)
            if key not in targets:
                targets[key] = _target(graph, *key)
    return list(targets.values())


def plan_all(graph: ir.Graph, resolved: Mapping[str, str]) -> list[Target]:
    """A target for every weight that is a linear layer or a convolution at all of its uses."""
    targets = [_target(graph, name, whole=False) for name in sorted(set(resolved.values()))]
    return [t for t in targets if t.kind != "weight" or _is_conv_weight(graph, t)]


def weight_value(graph: ir.Graph, name: str) -> ir.Value:
    """The initializer that holds a resolved weight."""
    return graph.initializers[name]


def gemm_is_linear(node: ir.Node) -> bool:
    """Whether a Gemm computes x W^T + b with nothing scaled."""
    attributes = node.attributes
    return (
        attributes.get_int("transB", 0) == 1
        and attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
    )


def value_uses(weight: ir.Value) -> list[tuple[ir.Node, int]]:
    """The uses of a weight's values; the exporter asks the shape of some (a Conv3d without bias), which stays."""
    return [(node, index) for node, index in weight.uses() if node.op_type != "Shape"]


def linear_sites(weight: ir.Value) -> list[Site] | None:
    """The uses of a weight (O, I) as x W^T, or None when it has any other use."""
    sites = []
    for node, index in value_uses(weight):
        if node.op_type == "Gemm" and index == 1 and gemm_is_linear(node):
            sites.append(_site(node))
        elif node.op_type == "Transpose" and _perm(node) == [1, 0] and not node.outputs[0].is_graph_output():
            uses = list(node.outputs[0].uses())
            if not all(n.op_type == "MatMul" and i == 1 for n, i in uses):
                return None
            sites += [_site(n) for n, _ in uses]
        else:
            return None
    return sites


def conv_sites(weight: ir.Value, *, grouped: bool) -> list[Site] | None:
    """The uses of a weight as a Conv kernel, or None when it has any other use.

    Args:
        weight: (O, I / groups, K1, ...).
        grouped: whether convs with groups > 1 count.
    """
    sites = []
    for node, index in value_uses(weight):
        if node.op_type != "Conv" or index != 1:
            return None
        groups = node.attributes.get_int("group", 1)
        padding = node.attributes.get_string("auto_pad", "NOTSET")
        if padding != "NOTSET" or (groups != 1 and not grouped):
            return None
        sites.append(_site(node))
    return sites


def geometry(node: ir.Node, kernel_axes: int) -> dict[str, list[int]]:
    """A Conv's strides, pads and dilations, with ONNX's defaults filled in."""
    return {
        "strides": list(node.attributes.get_ints("strides", [1] * kernel_axes)),
        "pads": list(node.attributes.get_ints("pads", [0] * (2 * kernel_axes))),
        "dilations": list(node.attributes.get_ints("dilations", [1] * kernel_axes)),
    }


def one_hot_window(kernel: Iterable[int]) -> np.ndarray:
    """The conv weight (K, 1, *kernel) that copies each of the K = K1 K2 .. taps into a channel of its own."""
    kernel = tuple(kernel)
    taps = math.prod(kernel)
    return np.eye(taps).reshape(taps, 1, *kernel)


def _target(graph: ir.Graph, name: str, whole: bool) -> Target:
    weight = weight_value(graph, name)
    shape = tuple(weight.const_value.shape.numpy())  # type: ignore[union-attr]
    dtype = weight.const_value.dtype.numpy().name  # type: ignore[union-attr]
    kind: Kind = "override" if whole else _kind(weight, shape)
    return Target(name, kind, shape, dtype)


def _is_conv_weight(graph: ir.Graph, target: Target) -> bool:
    return len(target.shape) > 2 and bool(conv_sites(weight_value(graph, target.name), grouped=True))


def _kind(weight: ir.Value, shape: tuple[int, ...]) -> Kind:
    if len(shape) == 2 and linear_sites(weight):
        return "linear"
    if len(shape) > 2 and conv_sites(weight, grouped=False):
        return "conv"
    return "weight"


def _site(node: ir.Node) -> Site:
    x, y = node.inputs[0], node.outputs[0]
    if x is None:
        raise UnsupportedTarget(f"attach a branch to node {node.name!r}", problem="its first input is missing")
    return Site(node, x, y)


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))
