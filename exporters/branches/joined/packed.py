"""The banked form for a GPU: fewer, larger operators for the branches of linear layers, and no Scan.

Passes over a graph to which the banked branches are attached.  CUDA graphs cannot record control flow, so `unroll`
makes batched products of convs with a weight per row, and one Gather of a layout per row.  `spread` gives such products
as many matrices on both sides.

`pack`:  Branches that read the same activation share one
product with their down factors, and factors of equal sizes are stacked, so that one Gather picks the rows of a stack:

    down (N, G R, I) = Gather(stack (T, S, G, R, I), adapter_index)[:, s]    for S groups of G branches
    inner (N, G, R, m) = down x^T
    y_g (N, m, O) += (inner_g^T up_g + bias_g),    up (N, G, R, O) likewise, of those branches with equal O

x, the activation, is (N, m, I).  Both products take their operands as they lie in memory; of the ways to lay the
factors out, this one was the fastest on an H200 in float16 and in float32 (`benchmarks/NOTES.md`).  Branches with
equal O share one product with their up factors, and one sum with their layers' biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.packing import Packed
from tpeft_deploy.exporters.branches.surgery import (
    add_constant,
    add_input,
    apply,
    call,
    constant_ints,
    reroute,
    route_around,
)
from tpeft_deploy.exporters.branches.tiled import LAYOUT
from tpeft_deploy.exporters.graph.batch_axes import order_of
from tpeft_deploy.exporters.graph.weight_uses import one_hot_window
from tpeft_deploy.exporters.oracle import bfloat16
from tpeft_deploy.exporters.oracle.subject import batch_axis

__all__ = ["biases_of", "cut", "pack", "spread", "unroll"]

_STACK = 32  # outputs of a Split that ONNX Runtime's CUDA kernel takes without a table in device memory


_WINDOWED = {
    "BankedGroupedConv": "WindowedGroupedConv",
    "BankedGroupedConvTranspose": "WindowedGroupedConvTranspose",
    "BankedWholeConv": "WindowedWholeConv",
}


class _Branch(NamedTuple):
    """A branch of a linear layer with a different adapter for each row."""

    node: ir.Node
    down: ir.Value
    up: ir.Value

    def operands(self) -> list[ir.Value]:
        """What the branch adds to and the activation that it reads, as they are now: packing replaces values."""
        return [value for value in self.node.inputs[:2] if value is not None]


def pack(model: ir.Model) -> tuple[Packed, ...]:
    """Pack the branches of a banked graph, in place.

    Returns:
        The new inputs; none where the graph has no branch that can be packed.
    """
    found: dict[tuple[int, int], list[_Branch]] = {}
    for branch in _branches(model.graph):
        found.setdefault((id(branch.operands()[1]), _size(branch.down, 1)), []).append(branch)
    # The nodes of a group stand before the first branch.
    groups = [(group[0].node, _alike(group)) for group in found.values()]
    packed: list[Packed] = []
    downs = _picked(model, packed, [[b.down for part in parts for b in part] for _, parts in groups], turned=True)
    ups = _picked(model, packed, [[b.up for b in part] for _, parts in groups for part in parts], turned=False)
    for first, parts in groups:
        _attach(model, first, parts, downs, ups)
    return tuple(packed)


def unroll(model: ir.Model) -> bool:
    """Replace the Scans over rows, in place, where that is possible.

    Returns:
        True if the graph had one that could be replaced.
    """
    found = False
    for node in list(model.graph):
        layout = _layout(node)
        if node.op_type in _WINDOWED:
            new = _windowed(model, node)
        elif layout:
            new = _laid_out(model, node, layout)
        else:
            continue
        route_around(node, new)
        found = True
    return found


def spread(model: ir.Model) -> bool:
    """Let convs with a weight per row pick a row of the banks for each row of the batch, in place.

    With one row for the whole batch, a product has a batch that only one operand has, for which CUDA takes a pointer
    for each matrix from the host.

    Returns:
        True if the graph had such a conv.
    """
    index = next(value for value in model.graph.inputs if value.name == slots.INDEX)
    batch = batch_axis(model.graph)
    source = next((v for v in model.graph.inputs if v.shape and str(v.shape[0]) == batch), None)
    readers = list(dict.fromkeys(node for conv in model.graph for node in _readers(conv, index)))
    if source is None or not readers:
        return False
    size = apply(model, "Shape", [source], like=None, after=None, attributes={"start": 0, "end": 1})
    one = constant_ints(model, [1])  # of no rows at all, one row of the banks
    size = apply(model, "Max", [size, one], like=None, after=size.producer())
    each = apply(model, "Expand", [index, size], like=index, after=size.producer())
    for node in readers:
        node.replace_input_with(list(node.inputs).index(index), each)
    return True


def _readers(conv: ir.Node, index: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read the index for a conv with a weight per row: the conv, and those that compute its change."""
    windowed = conv.op_type in _WINDOWED.values()
    x = conv.inputs[0 if windowed else 1] if windowed or conv.op_type.startswith("BankedConv") else None
    if x is None or order_of(x) != "major":
        return
    yield conv
    waiting = [conv.inputs[3]] if windowed else []
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None:
            waiting += node.inputs
            if index in node.inputs:
                yield node


def _windowed(model: ir.Model, conv: ir.Node) -> ir.Value:
    attributes = {name: attribute.value for name, attribute in conv.attributes.items()}
    group = attributes.pop("group")
    # A bank of whole weights (T, O, I, K1 ..) says what the kernel is.
    kernel = attributes.pop("kernel_shape", None) or list(conv.inputs[2].shape)[3:]  # type: ignore[union-attr, arg-type]
    dtype = (conv.outputs[0].dtype or ir.DataType.FLOAT).numpy()
    name = f"tpeft.window.{'x'.join(map(str, kernel))}.{dtype.name}"
    window = add_constant(model.graph, name, one_hot_window(kernel).astype(dtype))
    inputs = [value for value in conv.inputs if value is not None]
    inputs += [window, constant_ints(model, [group])]
    function, y = _WINDOWED[conv.op_type], conv.outputs[0]
    return call(model, function, inputs, name=f"{conv.name}.window", like=y, after=conv, attributes=attributes)


def _layout(node: ir.Node) -> list[ir.Node]:
    """The body of a Scan over one value that lays each row out anew; nothing for any other node."""
    body = list(node.attributes["body"].as_graph()) if node.op_type == "Scan" and len(node.inputs) == 1 else []
    return body if all(inner.op_type in LAYOUT for inner in body) else []


def _laid_out(model: ir.Model, scan: ir.Node, layout: Sequence[ir.Node]) -> ir.Value:
    """Lay out the places of a row's entries as the Scan does each row, and pick the entries from there."""
    changes = scan.inputs[0]
    if changes is None:
        raise ValueError("a Scan has an input")
    places = call(model, "BankedPlaces", [changes], name=f"{scan.name}.places", like=None, after=changes.producer())
    for inner in layout[1:]:  # the first gives the row the axis that the places have already
        node = ir.node(inner.op_type, [places, *inner.inputs[1:]], inner.attributes, name=f"{inner.name}.places")
        model.graph.insert_before(scan, node)
        places = node.outputs[0]
        places.name = f"{node.name}.out"
    return call(model, "BankedLayout", [changes, places], name=f"{scan.name}.rows", like=scan.outputs[0], after=scan)


def _branches(graph: ir.Graph) -> Iterator[_Branch]:
    for node in graph:
        y, x, _, down, up = node.inputs if node.op_type == "BankedLinear" else (None,) * 5
        if y is None or x is None or down is None or up is None:
            continue
        # A weight that several layers share has one bank for all of them.
        if all(value.is_graph_input() and len(list(value.uses())) == 1 for value in (down, up)):
            yield _Branch(node, down, up)


def _picked(
    model: ir.Model, packed: list[Packed], groups: Iterable[Sequence[ir.Value]], *, turned: bool
) -> dict[ir.Value, ir.Value]:
    """Stack groups of banks of equal sizes: first bank of a group -> its rows (N, 1, G, R, size)."""
    alike: dict[tuple[int, int, ir.DataType | None], list[Sequence[ir.Value]]] = {}
    for group in groups:
        alike.setdefault((len(group), _size(group[0], 1 if turned else 2), group[0].dtype), []).append(group)
    found = dict[ir.Value, ir.Value]()
    for (count, size, dtype), same in alike.items():
        for start in range(0, len(same), _STACK):
            part = same[start : start + _STACK]
            name = f"tpeft.packed.{len(packed)}"
            members = tuple(tuple(str(bank.name) for bank in group) for group in part)
            packed.append(Packed(name, members, turned))
            stack = add_input(
                model.graph, name, ["T", len(part), count, f"{name}.R", size], dtype or ir.DataType.UNDEFINED
            )
            found |= dict(zip((group[0] for group in part), _split_rows(model, stack, len(part)), strict=True))
    return found


def _split_rows(model: ir.Model, stack: ir.Value, count: int) -> Sequence[ir.Value]:
    """Pick the rows of a stack before all other nodes, and cut them into the groups."""
    index = next(value for value in model.graph.inputs if value.name == slots.INDEX)
    nodes = [ir.node("Gather", [stack, index], name=f"{stack.name}.rows")]
    if bfloat16.holds(model.graph):
        nodes.append(ir.node("Cast", nodes[-1].outputs, {"to": ir.DataType.BFLOAT16}, name=f"{stack.name}.narrow"))
    if count > 1:
        attributes = {"axis": 1, "num_outputs": count}
        cut = ir.node("Split", nodes[-1].outputs[:1], attributes, num_outputs=count, name=f"{stack.name}.cut")
        nodes.append(cut)
    for node in nodes:
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}.{place}"
            value.type = ir.TensorType(stack.dtype or ir.DataType.UNDEFINED)
    model.graph.insert_before(model.graph[0], nodes)
    return nodes[-1].outputs


def _alike(group: Iterable[_Branch]) -> list[list[_Branch]]:
    """Branches of a group by the size of what they add to."""
    parts: dict[int, list[_Branch]] = {}
    for branch in group:
        parts.setdefault(_size(branch.up, 2), []).append(branch)
    return list(parts.values())


def _attach(
    model: ir.Model,
    first: ir.Node,
    parts: Sequence[Sequence[_Branch]],
    downs: Mapping[ir.Value, ir.Value],
    ups: Mapping[ir.Value, ir.Value],
) -> None:
    """Put one product with the down factors of a group, and one for each size of up factors, in place of its branches.

    Args:
        model: graph that has them.
        first: node of the group's first branch.
        parts: branches by the size of their up factors.
        downs: first bank of a group -> its rows.
        ups: first bank of a part -> its rows.
    """
    index = next(value for value in model.graph.inputs if value.name == slots.INDEX)
    inputs = [parts[0][0].operands()[1], index, downs[parts[0][0].down]]
    inner = call(model, "PackedDown", inputs, name=f"{first.name}.down", like=None, after=first)
    for part, own in zip(parts, cut(model, inner, [len(part) for part in parts]), strict=True):
        name, after = str(part[0].node.name), own.producer()
        change = call(model, "PackedUp", [own, ups[part[0].up]], name=f"{name}.up", like=None, after=after)
        sums = [branch.node.outputs[0] for branch in part]
        if biases := biases_of([branch.node for branch in part]):
            stack = add_constant(model.graph, f"{name}.biases", np.stack([bias for _, bias in biases])[:, None])
            change = apply(model, "Add", [change, stack], like=None, after=change.producer())
            sums = [node.outputs[0] for node, _ in biases]
        for branch, old, own_change in zip(part, sums, cut(model, change, [1] * len(part)), strict=True):
            after = own_change.producer() if branch.node is first else branch.node
            name = f"{branch.node.name}.sum"
            reroute(old, call(model, "PackedSum", [branch.operands()[0], own_change], name=name, like=old, after=after))
            gone = [node for node in (old.producer(), branch.node) if node is not None]
            model.graph.remove(list(dict.fromkeys(gone)), safe=True)
    for branch in (branch for part in parts for branch in part):
        model.graph.inputs.remove(branch.down)
        model.graph.inputs.remove(branch.up)


def cut(model: ir.Model, value: ir.Value, sizes: Sequence[int], axis: int = 1) -> Sequence[ir.Value]:
    """Split what a value has of several branches."""
    producer = value.producer()
    if len(sizes) == 1 or producer is None:
        return [value]
    cut = ir.node(
        "Split",
        [value, constant_ints(model, sizes)],
        {"axis": axis},
        num_outputs=len(sizes),
        name=f"{producer.name}.cut",
    )
    for place, output in enumerate(cut.outputs):
        output.name = f"{cut.name}.{place}"
    model.graph.insert_after(producer, cut)
    return cut.outputs


def biases_of(branches: Sequence[ir.Node]) -> list[tuple[ir.Node, np.ndarray]]:
    """The sums with biases that follow branches, and the biases; nothing unless several branches all have one."""
    found = [_bias(branch.outputs[0]) for branch in branches]
    return [bias for bias in found if bias] if len(found) > 1 and all(found) else []


def _bias(value: ir.Value) -> tuple[ir.Node, np.ndarray] | None:
    uses = list(value.uses())
    node = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    if node is None or node.op_type != "Add" or node.domain:
        return None
    bias = node.inputs[1 - uses[0].idx]
    constant = bias is not None and bias.is_initializer() and not bias.is_graph_input()
    if bias is None or not constant or bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    return (node, bias.const_value.numpy()) if value.shape and bias.const_value.shape[0] == value.shape[-1] else None


def _size(bank: ir.Value, axis: int) -> int:
    size = bank.shape[axis] if bank.shape is not None else None
    if not isinstance(size, int):
        raise TypeError(f"bank {bank.name!r} has no fixed size along axis {axis}")
    return size
