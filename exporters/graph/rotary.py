"""Rotary position encodings as one operator, com.microsoft.RotaryEmbedding, in place of some twelve.

A step of a decoder on small models takes as long for these and for the reshapes around them as for its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

__all__ = ["fuse_rotary"]

_DOMAIN = "com.microsoft"
_SWAPPED = [0, 2, 1, 3]


class _Rotation(NamedTuple):
    """x cos + concat(-x[half:], x[:half]) sin, of x (rows, heads, chunk, size).

    Attributes:
        x: tensor before the rotation.
        cos: cosines (rows, chunk, size), both halves alike.
        sin: sines likewise.
        users: the nodes that read x.
        total: the node that makes the result.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    users: Sequence[ir.Node]
    total: ir.Node


def fuse_rotary(graph: ir.Graph) -> int:
    """Fuse the rotations of a decoder's float32 graph, in place, and drop the reshapes that undo each other.

    Returns:
        How many rotations were fused.
    """
    caches: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
    rotations = [found for node in list(graph) if node.op_type == "Neg" and (found := _rotation(node)) is not None]
    for rotation in rotations:
        key = (rotation.cos, rotation.sin)
        if key not in caches:
            caches[key] = _caches(graph, *key)
        _fuse(graph, rotation, caches[key])
    _drop_reshapes(graph)
    graph.sort()
    return len(rotations)


def _rotation(neg: ir.Node) -> _Rotation | None:
    high, join = _made_by(neg.inputs[0], "Slice"), _only_user(neg, "Concat")
    turned = _only_user(join, "Mul")
    total = _only_user(turned, "Add")
    if high is None or join is None or turned is None or total is None or len(join.inputs) != 2:
        return None
    low, plain = _made_by(join.inputs[1], "Slice"), _made_by(_other(total, turned), "Mul")
    x = high.inputs[0]
    if low is None or plain is None or x is None or x not in plain.inputs or total.outputs[0].is_graph_output():
        return None
    if not _are_halves(x, low, high, join):
        return None
    cos, sin = (_encoding(value, x) for value in (_other(plain, x), _other(turned, join)))
    return None if cos is None or sin is None else _Rotation(x, cos, sin, [low, high, plain], total)


def _are_halves(x: ir.Value, low: ir.Node, high: ir.Node, join: ir.Node) -> bool:
    """Whether two slices are the halves of the last axis of x, and are joined along it."""
    size = x.shape[-1] if x.shape is not None and len(x.shape) == 4 else None
    if x.dtype != ir.DataType.FLOAT or not isinstance(size, int) or size % 2 or low.inputs[0] is not x:
        return False
    own = [[_int(value) for value in node.inputs[1:]] for node in (low, high)]
    first, second = ([*numbers, *[1] * (4 - len(numbers))] for numbers in own)
    ends = second[1] is not None and second[1] >= size
    axes = {first[2], second[2], join.attributes.get_int("axis", 0)} <= {3, -1}
    return first[:2] == [0, size // 2] and second[0] == size // 2 and ends and axes and first[3] == second[3] == 1


def _encoding(value: ir.Value | None, x: ir.Value) -> ir.Value | None:
    """The cosines or sines (rows, chunk, size) of which an operand (rows, 1, chunk, size) is a view."""
    lifted = _made_by(value, "Unsqueeze")
    own = lifted.inputs[0] if lifted is not None else None
    if lifted is None or own is None or own.shape is None or x.shape is None or _int(lifted.inputs[1]) != 1:
        return None
    rows, chunk = x.shape[0], x.shape[2]
    fits = list(own.shape) == [rows, chunk, x.shape[3]] and own.dtype == x.dtype
    return own if fits and _repeats(own) else None


def _repeats(value: ir.Value) -> bool:
    """Whether both halves of the last axis are alike: a function, perhaps scaled or cast, of a value joined twice."""
    node = value.producer()
    while node is not None and node.op_type in {"Cast", "Cos", "Sin", "Mul"}:
        others = [other for other in node.inputs[1:] if other is None or other.shape is None or len(other.shape)]
        if others:
            return False
        own = node.inputs[0]
        node = own.producer() if own is not None else None
    return node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


def _caches(graph: ir.Graph, cos: ir.Value, sin: ir.Value) -> list[ir.Value]:
    """The operator's inputs behind the first: places in the caches (rows, chunk), and those (rows chunk, size / 2)."""
    half = int(cos.shape[-1]) // 2  # type: ignore[index, arg-type]  # _encoding has seen to it
    name = f"{cos.name}.rotary"
    shape = _add(graph, "Shape", [cos], f"{name}.shape", start=0, end=2)
    count = _add(graph, "ReduceProd", [shape], f"{name}.count", keepdims=0)
    ends = [_add(graph, "Constant", [], f"{name}.{number}", value_int=number) for number in (0, 1)]
    places = _add(graph, "Range", [ends[0], count, ends[1]], f"{name}.places")
    found = [_add(graph, "Reshape", [places, shape], f"{name}.ids")]
    slices = [_ints(graph, [number], f"{name}.slice.{number}") for number in (0, half, 2)]
    flat = _ints(graph, [-1, half], f"{name}.flat")
    for value in (cos, sin):
        own = _add(graph, "Slice", [value, *slices], f"{value.name}.rotary.half")
        found.append(_add(graph, "Reshape", [own, flat], f"{value.name}.rotary.cache"))
    return found


def _fuse(graph: ir.Graph, rotation: _Rotation, caches: Sequence[ir.Value]) -> None:
    """Rotate (rows, chunk, heads size) where what is before and behind swaps axes only, else x as it is."""
    x, y = rotation.x, rotation.total.outputs[0]
    before, behind = _made_by(x, "Transpose"), _only_user(rotation.total, "Transpose")
    last = _only_user(behind, "Reshape")
    ids, cos, sin = caches
    flat = last is not None and not last.outputs[0].is_graph_output() and len(last.outputs[0].shape or ()) == 3
    alone = {user for user, _ in x.uses()} == set(rotation.users)
    if before is not None and behind is not None and last is not None and flat and alone and _swap(before, behind):
        own, y = before.inputs[0], last.outputs[0]
        shape = _ints(graph, [0, 0, -1], f"{y.name}.rotary.shape")
        x = _add(graph, "Reshape", [own, shape], f"{y.name}.rotary.in")  # type: ignore[list-item]
        x.shape, x.type = y.shape, y.type
    new = _add(graph, "RotaryEmbedding", [x, ids, cos, sin], f"{y.name}.rotary", domain=_DOMAIN)
    new.shape, new.type = y.shape, y.type
    y.replace_all_uses_with(new)


def _swap(*nodes: ir.Node) -> bool:
    return all(list(node.attributes.get_ints("perm", [])) == _SWAPPED for node in nodes)


def _drop_reshapes(graph: ir.Graph) -> None:
    """Use the first value of a chain of reshapes where the last has its shape again."""
    for node in list(graph):
        value = node.outputs[0]
        if node.op_type != "Reshape" or value.shape is None or value.is_graph_output():
            continue
        origin = node
        while (before := _made_by(origin.inputs[0], "Reshape")) is not None:
            origin = before
        first = origin.inputs[0]
        known = first is not None and first.shape is not None and list(first.shape) == list(value.shape)
        if first is not None and known and all(_is_named(size) for size in value.shape):
            value.replace_all_uses_with(first)


def _is_named(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None


def _add(
    graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], name: str, *, domain: str = "", **attributes: object
) -> ir.Value:
    """Append a node; the graph is sorted in the end."""
    node = ir.node(op_type, inputs, attributes, domain=domain, name=name)  # type: ignore[arg-type]
    node.outputs[0].name = f"{name}.out"
    graph.append(node)
    return node.outputs[0]


def _ints(graph: ir.Graph, numbers: Sequence[int], name: str) -> ir.Value:
    return _add(graph, "Constant", [], name, value_ints=list(numbers))


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _only_user(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The only user of a node's output, if it is such an operator."""
    output = node.outputs[0] if node is not None else None
    users = [user for user, _ in output.uses()] if output is not None and not output.is_graph_output() else []
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _other(node: ir.Node, own: ir.Node | ir.Value) -> ir.Value | None:
    """The other operand of a node with two."""
    value = own.outputs[0] if isinstance(own, ir.Node) else own
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _int(value: ir.Value | None) -> int | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None and not value.is_graph_input() else None
    return int(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None
