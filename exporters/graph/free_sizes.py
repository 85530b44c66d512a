"""Sizes that depend on a head which tasks replace by one of another size, followed from the head to the outputs.

A trace writes the size of the base's head into every Reshape, Expand and Split behind it.  Where the entry that holds
it is known, it is replaced by one that ONNX computes when the graph runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Varies
from tpeft_deploy.errors import UnsupportedTarget
from tpeft_deploy.exporters.branches.surgery import add_constant, apply

__all__ = ["free_sizes", "varies_of"]

_KEY = "tpeft.varies"
_FIX = {
    True: "Export that task folded, or let the application do this step.",
    False: "Take the size from the tensor in the module's forward, or export the module with that head, folded.",
}
_SAME = {"Identity", "Cast", "Relu", "Sigmoid", "Tanh", "Exp", "Log", "Neg", "Sqrt", "Abs", "Softplus", "LeakyRelu"}
_SAME |= {"Gelu", "HardSigmoid", "HardSwish", "Elu", "Erf", "Clip", "Not", "Dropout", "Reciprocal", "IsNaN", "Floor"}
_JOINT = {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Equal", "Less", "Greater", "And", "Or", "Min", "Max"}


@dataclass(frozen=True)
class _Size:
    """An axis of a value that has `times` C + `plus` entries, those of the head's first class first."""

    axis: int
    weight: str
    times: int = 1
    plus: int = 0


class _Stuck(Exception):
    """A node's effect on the size of a head, where it cannot be undone.

    Args:
        reason: completes "node .. of the base".
        folded: whether a graph of that head alone would still be right.
    """

    def __init__(self, reason: str, *, folded: bool = False) -> None:
        super().__init__(reason)
        self.folded = folded


def free_sizes(model: ir.Model, names: Iterable[str], resized: Iterable[str] = (), *, folded: bool = False) -> None:
    """Let no traced size of these heads stand in a graph, in place, as far as their sizes can be followed.

    Args:
        model: a raw graph with the shapes of the trace.
        names: initializers with a first size that a task may change.
        resized: those of them with a first size that a task is known to change.
        folded: whether each graph will hold one head alone, so that none is padded to the size of another.

    Raises:
        UnsupportedTarget: the size of a head in `resized` cannot be followed.
    """
    graph, changed = model.graph, set(resized)
    heads = [graph.initializers[name] for name in names if name in graph.initializers]
    known = {value: _Size(0, str(value.name)) for value in heads if value.shape}
    for node in list(graph):
        found = {value: known[value] for value in node.inputs if value is not None and value in known}
        rule = _RULES.get(node.op_type) if node.domain == "" and found else None
        try:
            size = rule(model, node, found) if rule is not None else None
        except _Stuck as stuck:
            size, weights = None, changed & {size.weight for size in found.values()}
            if weights and not (folded and stuck.folded):
                raise UnsupportedTarget(
                    f"give override {min(weights)!r} another size than the base's",
                    problem=f"node {node.name!r} ({node.op_type}) of the base {stuck}",
                    fix=_FIX[stuck.folded],
                ) from None
        known |= dict.fromkeys(node.outputs, size) if size is not None else {}
    for value in graph.outputs:
        if value in known:
            size = known[value]
            value.meta[_KEY] = Varies(size.axis, size.weight, size.times, size.plus)


def varies_of(output: ir.Value) -> Varies | None:
    """Result of `free_sizes` for an output."""
    found: Varies | None = output.meta.get(_KEY)
    return found


_Found = Mapping[ir.Value, _Size]
_Dim = int | ir.SymbolicDim
_PRIME = 1_000_003
_MIXES = "takes all of its entries together, and heads of several sizes in one bank are padded with zeros"


def _product(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    """A head as the matrix of a MatMul or Gemm, or its product with another."""
    x, matrix = node.inputs[0], node.inputs[1]
    axes = _axes(node.outputs[0])
    if x is None or matrix is None or matrix not in found or axes is None:
        return None
    size = found[matrix]
    # A layer that is used twice reads what it wrote: no task can change its size, and the base's stays.
    if x in found and (found[x].axis, found[x].weight) != ((_axes(x) or 0) - 1, size.weight):
        return None
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    if _axes(matrix) != 2 or size.axis != (0 if turned else 1):
        return None
    return replace(size, axis=axes - 1)


def _conv(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    kernel = node.inputs[1]
    plain = node.attributes.get_int("group", 1) == 1 and node.inputs[0] not in found
    size = found.get(kernel) if kernel is not None and plain else None
    return replace(size, axis=1) if size is not None and size.axis == 0 else None


def _same(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    return found.get(node.inputs[0])  # type: ignore[arg-type]


def _along(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    """Softmax: entries of a padded axis would change each other."""
    size, axes = _same(model, node, found), _axes(node.outputs[0])
    if size is None or axes is None:
        return None
    if node.attributes.get_int("axis", -1) % axes == size.axis:
        raise _Stuck(_MIXES, folded=True)
    return size


def _reduce(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, axes = _same(model, node, found), _axes(node.inputs[0])
    own = _integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if size is None or axes is None:
        return None
    gone = {axis % axes for axis in own} if own else set(range(axes))
    if size.axis in gone:
        raise _Stuck(_MIXES, folded=True)
    kept = node.attributes.get_int("keepdims", 1) == 1
    return size if kept else replace(size, axis=size.axis - sum(axis < size.axis for axis in gone))


def _split(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, axes = _same(model, node, found), _axes(node.inputs[0])
    if size is not None and axes is not None and node.attributes.get_int("axis", 0) % axes == size.axis:
        raise _Stuck("cuts it at the sizes of the trace")
    return size


def _gather(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, axes, index = _same(model, node, found), _axes(node.inputs[0]), node.inputs[1]
    left = _axes(node.outputs[0])
    if size is None or axes is None or left is None or index in found:
        return None
    axis = node.attributes.get_int("axis", 0) % axes
    if axis == size.axis:
        return None
    return replace(size, axis=size.axis + (left - axes if axis < size.axis else 0))


def _joint(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    axes = _axes(node.outputs[0])
    if axes is None:
        return None
    # The bias of a layer has the size of its matrix: the matrix speaks for both.
    sizes = [replace(s, axis=s.axis + axes - (_axes(v) or 0)) for v, s in found.items() if v.producer() is not None]
    sizes = sizes or [replace(s, axis=s.axis + axes - (_axes(v) or 0)) for v, s in found.items()]
    return sizes[0] if len({(s.axis, s.times, s.plus) for s in sizes}) == 1 else None


def _transpose(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, x, y = _same(model, node, found), node.inputs[0], node.outputs[0]
    if size is None or x is None or x.shape is None:
        return None
    order = list(node.attributes.get_ints("perm", list(range(len(x.shape)))[::-1]))
    if y.shape is None:  # the exporter leaves it out for weights
        y.shape = ir.Shape([x.shape[axis] for axis in order])
    return replace(size, axis=order.index(size.axis))


def _concat(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    axes, sizes = _axes(node.outputs[0]), set(found.values())
    if axes is None or len({size.axis for size in sizes}) != 1:
        return None
    axis = node.attributes.get_int("axis", 0) % axes
    size = next(iter(sizes))
    if axis != size.axis:
        return size if len(sizes) == 1 and all(value in found for value in node.inputs) else None
    before = [_length(value, axis) for value in node.inputs[:-1]]
    # Columns of a narrower head come first only where nothing stands behind them.
    if list(found) != [node.inputs[-1]] or not all(isinstance(length, int) for length in before):
        return None
    return replace(size, plus=size.plus + sum(filter(None, before)))


def _reshape(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    """One entry of the new shape becomes 0, the size that goes in, or -1, what is left over."""
    x, shape, y = node.inputs[0], node.inputs[1], node.outputs[0]
    size = found.get(x) if x is not None else None
    if size is None or x is None or shape is None or x.shape is None or y.shape is None or shape in found:
        return None
    place = _regrouped(list(x.shape), list(y.shape), size.axis)
    if place is None:
        raise _Stuck(f"fixes it: {_told(x.shape)} becomes {_told(y.shape)}")
    axis, inner = place
    if (axis, inner) == (size.axis, 1) and node.attributes.get_int("allowzero", 0) == 0:
        _put(model, node, 1, axis, 0, len(y.shape))
        return size
    if any(entry == -1 for i, entry in enumerate(_entries(shape)) if i != axis):
        raise _Stuck("computes another size from it")
    _put(model, node, 1, axis, -1, len(y.shape))
    return replace(size, axis=axis, times=size.times * inner, plus=size.plus * inner)


def _expand(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x not in found or _axes(x) is None or y.shape is None:
        return None
    axis = found[x].axis + len(y.shape) - len(x.shape)  # type: ignore[arg-type]
    _put(model, node, 1, axis, 1, len(y.shape))
    return replace(found[x], axis=axis)


def _unsqueeze(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, own = _same(model, node, found), _integers(node.inputs[1])
    axes = _axes(node.outputs[0])
    if size is None or own is None or axes is None:
        return None
    new = {axis % axes for axis in own}
    return replace(size, axis=[axis for axis in range(axes) if axis not in new][size.axis])


def _squeeze(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, axes = _same(model, node, found), _axes(node.inputs[0])
    own = _integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if size is None or axes is None or own is None or size.axis in {axis % axes for axis in own}:
        return None
    return replace(size, axis=size.axis - sum(axis % axes < size.axis for axis in own))


def _slice(model: ir.Model, node: ir.Node, found: _Found) -> _Size | None:
    size, axes = _same(model, node, found), _axes(node.inputs[0])
    own = _integers(node.inputs[3]) if len(node.inputs) > 3 else None
    if size is None or axes is None or own is None or size.axis in {axis % axes for axis in own}:
        return None
    return size


_RULES: dict[str, Callable[[ir.Model, ir.Node, _Found], _Size | None]] = {
    **dict.fromkeys([*_SAME, "SequenceAt"], _same),
    **dict.fromkeys(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"], _reduce),
    **dict.fromkeys(["Split", "SplitToSequence"], _split),
    "Gather": _gather,
    **dict.fromkeys(_JOINT, _joint),
    "MatMul": _product,
    "Gemm": _product,
    "Conv": _conv,
    "Softmax": _along,
    "LogSoftmax": _along,
    "Transpose": _transpose,
    "Concat": _concat,
    "Reshape": _reshape,
    "Expand": _expand,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Slice": _slice,
}


def _axes(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _length(value: ir.Value | None, axis: int) -> int | None:
    size = value.shape[axis] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _integers(value: ir.Value | None) -> list[int] | None:
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def _entries(shape: ir.Value) -> list[int | None]:
    """The entries of a shape as far as they are constants; None where one is computed."""
    own, producer = _integers(shape), shape.producer()
    if own is not None or producer is None or producer.op_type != "Concat":
        return list(own or [])
    entries: list[int | None] = []
    for part in producer.inputs:
        entries += _integers(part) or [None] * (_length(part, 0) or 1)
    return entries


def _regrouped(before: Sequence[_Dim], after: Sequence[_Dim], axis: int) -> tuple[int, int] | None:
    """Place of an axis after a Reshape: the new axis, and its number of entries for each old one."""
    old, new = [_number(size, _PRIME) for size in before], [_number(size, _PRIME) for size in after]
    if None in old or None in new:
        return None
    starts = [i for i in range(len(new)) if math.prod(new[:i]) == math.prod(old[:axis])]  # type: ignore[arg-type]
    for start in starts:
        for end in range(axis + 1, len(old) + 1):
            inner = [size for size in before[axis + 1 : end] if isinstance(size, int)]
            if len(inner) == end - axis - 1 and new[start] == math.prod(old[axis:end]):  # type: ignore[arg-type]
                return start, math.prod(inner)
    return None


def _number(size: _Dim, least: int) -> int | None:
    """A size with a different large value for every free one, so that equal products are products of the same."""
    if isinstance(size, int):
        return size
    try:
        own = {str(name): least + 2 * int.from_bytes(str(name).encode(), "big") for name in size.free_symbols()}
        number = size.evaluate(own)
    except (TypeError, ValueError):
        return None
    return number if isinstance(number, int) else None


def _told(shape: ir.Shape) -> str:
    return str([size if isinstance(size, int) else size.value for size in shape])


def _put(model: ir.Model, node: ir.Node, position: int, axis: int, entry: int, count: int) -> None:
    """Replace one entry of a shape that a node takes."""
    shape, producer = node.inputs[position], node.inputs[0].producer()  # type: ignore[union-attr]
    if shape is None:
        return
    name = f"tpeft.entry.{entry}.{axis}.{count}"
    chosen = add_constant(model.graph, f"{name}.chosen", np.arange(count) == axis)
    new = add_constant(model.graph, f"{name}.new", np.array([entry], np.int64))
    last = shape.producer() or producer
    after = max((n for n in (last, producer) if n is not None), key=_place(model.graph), default=None)
    mended = apply(model, "Where", [chosen, new, shape], like=shape, after=after)
    node.replace_input_with(position, mended)


def _place(graph: ir.Graph) -> Callable[[ir.Node], int]:
    places = {id(node): i for i, node in enumerate(graph)}
    return lambda node: places.get(id(node), -1)
