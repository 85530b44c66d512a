"""Layers on what all rows share, such as a timestep's embedding or a table of positions without a batch axis.

Rows of different adapters get different results there.  So all that is computed from the layer's result up to where it
meets the batch is computed once per adapter, in a Scan over `adapter_index`, and laid out along the batch there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from tpeft_deploy.exporters.branches.surgery import apply, call, constant_ints, reroute
from tpeft_deploy.exporters.graph.batch_axes import order_of

__all__ = ["has_batch", "lift", "partners"]

_POINTWISE = {"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Where"}
_SIZED = {"ConstantOfShape", "Expand", "Range", "Reshape", "Resize", "Tile"}  # their results have other sizes
_MATRIX = 2  # axes of a product that do not broadcast


class Meeting(NamedTuple):
    """An input of a node at which a shared value meets the batch; `partner` shows how often a row repeats there."""

    node: ir.Node
    position: int
    partner: ir.Value | None


class Region(NamedTuple):
    """The nodes that compute from a shared value what has no batch axis, and where their results meet the batch."""

    nodes: list[ir.Node]
    meetings: list[Meeting]


def has_batch(value: ir.Value, batch: str) -> bool:
    """Whether an axis of a value depends on the size of the batch, as far as shapes show."""
    if value.const_value is not None:
        return False
    if value.shape is not None:
        return any(_mentions(size, batch) for size in value.shape)
    node = value.producer()
    if node is None:
        return True
    if node.op_type in _SIZED:
        return _is_of_inputs(value)
    return any(has_batch(other, batch) for other in node.inputs if other is not None)


def _is_of_inputs(value: ir.Value) -> bool:
    """Whether a value, its sizes included, is computed from an input of the graph."""
    left, seen = [value], set[ir.Value]()
    while left:
        own = left.pop()
        node = own.producer()
        if own.const_value is None and node is None:
            return True
        if own.const_value is None and node is not None and own not in seen:
            left += [other for other in node.inputs if other is not None]
        seen.add(own)
    return False


def partners(y: ir.Value, batch: str) -> list[ir.Value]:
    """The values with a batch that the results of a shared value meet, if it can be lifted."""
    region = _region([y], batch)
    return [meeting.partner for meeting in region.meetings if meeting.partner is not None] if region else []


def lift(model: ir.Model, branches: Sequence[ir.Node], index: ir.Value, batch: str) -> list[ir.Node]:
    """Compute per adapter what follows from branches for one adapter on shared values.

    Args:
        model: changed.
        branches: calls that take (y, x, adapter_index, ..); their results have the shapes of the base's.
        index: the graph's `adapter_index`.
        batch: the free size that stands for the batch.

    Returns:
        The branches that serve rows of different adapters now.
    """
    done: list[ir.Node] = []
    left = list(branches)
    while left:
        region = _joined(left, batch)
        own = [node for node in left if region is not None and node in region.nodes] or left[:1]
        left = [node for node in left if node not in own]
        if region is not None and all(_is_placed(meeting, batch) for meeting in region.meetings):
            _scan(model, region, index)
            for node in own:
                reroute(node.outputs[0], _first(node))
            done += own
    return done


def _joined(branches: Sequence[ir.Node], batch: str) -> Region | None:
    """The region of the first branch, together with all branches of overlapping regions."""
    members = [branches[0]]
    while True:
        region = _region([node.outputs[0] for node in members], batch)
        if region is None:
            return None
        known = {*members, *region.nodes}
        near = [n for n in branches if n not in members and (n in known or _overlaps(n, known, batch))]
        if not near:
            return Region([*members, *(n for n in region.nodes if n not in members)], region.meetings)
        members += near


def _overlaps(branch: ir.Node, nodes: set[ir.Node], batch: str) -> bool:
    region = _region([branch.outputs[0]], batch)
    return region is None or bool(nodes & {*region.nodes, *(m.node for m in region.meetings)})


def _region(values: Sequence[ir.Value], batch: str) -> Region | None:
    if any(has_batch(value, batch) for value in values):
        return None
    nodes: dict[ir.Node, None] = {}
    meetings: list[Meeting] = []
    left = list(values)
    while left:
        value = left.pop()
        if value.is_graph_output():
            return None
        for node, index in value.uses():
            if node.op_type == "Shape" or node in nodes:
                continue
            free = not any(has_batch(output, batch) for output in node.outputs)
            if free and not any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
                nodes[node] = None
                left += node.outputs
                continue
            meeting = _meeting(node, index, value, batch)
            if meeting is None:
                return None
            meetings.append(meeting)
    return Region(list(nodes), meetings)


def _meeting(node: ir.Node, index: int, value: ir.Value, batch: str) -> Meeting | None:
    out = node.outputs[0]
    if out.shape is None or value.shape is None or len(node.outputs) != 1:
        return None
    axes, own = len(out.shape), len(value.shape)
    fits = own < axes or (own == axes and value.shape[0] == 1)
    if not fits or not _mentions(out.shape[0], batch) or any(_mentions(size, batch) for size in out.shape[1:]):
        return None
    exact = _is(out.shape[0], batch)
    if node.op_type == "Expand":
        return Meeting(node, index, None) if exact and index == 0 else None
    if node.op_type != "MatMul" and node.op_type not in _POINTWISE:
        return None
    if node.op_type == "MatMul" and (axes <= _MATRIX or own < _MATRIX):
        return None
    others = [other for i, other in enumerate(node.inputs) if i != index and other is not None]
    partner = next((o for o in others if o.shape is not None and len(o.shape) == axes and has_batch(o, batch)), None)
    return Meeting(node, index, partner) if partner is not None else None


def _is_placed(meeting: Meeting, batch: str) -> bool:
    """Whether the rows are known to come first where a lifted value goes."""
    shape = meeting.node.outputs[0].shape
    exact = shape is not None and _is(shape[0], batch)
    return exact or (meeting.partner is not None and order_of(meeting.partner) == "major")


def _scan(model: ir.Model, region: Region, index: ir.Value) -> None:
    kept = list(dict.fromkeys(_input(meeting) for meeting in region.meetings))
    name = f"{region.nodes[0].name}.lifted"
    rows = apply(model, "Reshape", [index, constant_ints(model, [-1, 1])], like=None, after=None)
    body = _body(region, kept, index, name)
    outputs = [ir.Value(name=f"{name}.{i}", type=value.type) for i, value in enumerate(kept)]
    attributes = {"body": body, "num_scan_inputs": 1}
    scan = ir.node("Scan", [rows], attributes, outputs=outputs, name=name)  # type: ignore[arg-type]
    model.graph.append(scan)
    for i, meeting in enumerate(region.meetings):
        value = _input(meeting)
        stacked = outputs[kept.index(value)]
        new = _along_rows(model, stacked, meeting, index, f"{name}.rows.{i}", after=scan)
        meeting.node.replace_input_with(meeting.position, new)
    model.graph.sort()


def _body(region: Region, kept: Sequence[ir.Value], index: ir.Value, name: str) -> ir.Graph:
    """The region for one adapter; its number is the only input."""
    row = ir.Value(name=f"{name}.row", shape=ir.Shape([1]), type=index.type)
    inside: dict[ir.Value, ir.Value] = {index: row}
    order = {node: i for i, node in enumerate(region.nodes[0].graph or ())}
    nodes = []
    for node in sorted(region.nodes, key=lambda n: order[n]):
        inputs = [inside.get(value, value) if value is not None else None for value in node.inputs]
        outputs = [ir.Value(name=f"{name}.{o.name}", type=o.type) for o in node.outputs]
        inside |= dict(zip(node.outputs, outputs, strict=True))
        copied = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=f"{name}.{node.name}"
        )
        nodes.append(copied)
    return ir.Graph([row], [inside[value] for value in kept], nodes=nodes, name=f"{name}.body")


def _along_rows(
    model: ir.Model, stacked: ir.Value, meeting: Meeting, index: ir.Value, name: str, *, after: ir.Node
) -> ir.Value:
    """Results (N, ..) per adapter, laid out to broadcast along the first axis of what they meet."""
    out, value = meeting.node.outputs[0], _input(meeting)
    if out.shape is None or value.shape is None:
        raise ValueError("a meeting has shapes")
    missing = len(out.shape) - 1 - len(value.shape)
    axes = constant_ints(model, [1] if missing < 0 else list(range(1, missing + 1)))
    laid_out = stacked
    if missing:
        laid_out = apply(model, "Squeeze" if missing < 0 else "Unsqueeze", [stacked, axes], like=None, after=after)
        laid_out.type = value.type
    if meeting.partner is None:
        return laid_out
    last = laid_out.producer() or after
    spread = call(model, "BankedSpread", [laid_out, meeting.partner, index], name=name, like=None, after=last)
    spread.type = value.type
    return spread


def _input(meeting: Meeting) -> ir.Value:
    value = meeting.node.inputs[meeting.position]
    if value is None:
        raise ValueError("a meeting has a value")
    return value


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError("a branch has what it adds to")
    return value


def _mentions(size: int | ir.SymbolicDim, batch: str) -> bool:
    return isinstance(size, ir.SymbolicDim) and (
        size.value is None or batch in re.findall(r"[A-Za-z_]\w*", str(size.value))
    )


def _is(size: int | ir.SymbolicDim, batch: str) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value == batch
