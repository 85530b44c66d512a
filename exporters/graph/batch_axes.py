"""Detect the batch axis of activations by perturbing single rows of the input.

Nothing in an ONNX graph says whether the first axis of an intermediate value is the batch: a layer may lay its rows
out sequence-major (nn.MultiheadAttention), fold frames into the batch, or work on a table that every row shares.
What is found here is proved by the row-by-row gate at other sizes and with other values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.tucker import Array

__all__ = ["AxisOrder", "find", "mark", "order_of", "same_order"]

AxisOrder = Literal["major", "minor", "shared", "mixed"]
"""Rows of a batch inside an activation; all axes but the last (convolutions: but the first) are taken as one.

major: entry i belongs to row i // m; minor: to row i % B; shared: to none, it is the same for all rows;
mixed: rows depend on each other, or are ordered in yet another way.
"""

_KEY = "tpeft.order"
_ROWS = 3


def order_of(value: ir.Value) -> AxisOrder:
    """Order that `mark` wrote; a weight is the same for all rows, and rows come first in a value without a mark."""
    if value.const_value is not None:
        return "shared"
    found: AxisOrder = value.meta.get(_KEY, "major")
    return found


def same_order(new: ir.Value, old: ir.Value) -> ir.Value:
    """`new`, with the rows of a value that it was computed from row by row."""
    if _KEY in old.meta:
        new.meta[_KEY] = old.meta[_KEY]
    return new


def mark(graph: ir.Graph, found: Mapping[str, AxisOrder]) -> None:
    """Write what `find` found onto the values of a copy of the graph."""
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.name in found:
            value.meta[_KEY] = found[str(value.name)]


def find(subject: Subject, raw: ir.Model, values: Iterable[tuple[str, int]], place: Path) -> dict[str, AxisOrder]:
    """Run the base on rows of which one was replaced, and see where its values change.

    Args:
        subject: base that gives the rows.
        raw: its raw graph, left as it is.
        values: name of a value -> how many of its leading axes are rows and positions; 0 is all of them, negative
            ones leave out axes at the end.
        place: a directory for the graph that is run.

    Returns:
        The name of every value -> where its rows are.
    """
    wanted = dict(values)
    batch = subject.batch
    if not wanted or batch is None:
        return {}
    file = place / "rows.onnx"
    ir.save(_showing(raw, wanted), file, external_data="rows.data")
    session = compare.open_session(file)
    sizes = subject.shapes[0] | {batch: _ROWS}
    inputs = subject.inputs(sizes)
    batched = {str(v.name) for v in raw.graph.inputs if v.shape and str(v.shape[0]) == batch}
    before = compare.run(session, inputs, {})
    found: dict[str, set[AxisOrder]] = {name: set() for name in wanted}
    for row in (1, 2):
        changed = {name: _replace(array, row) if name in batched else array for name, array in inputs.items()}
        after = compare.run(session, changed, {})
        for name, axes in wanted.items():
            found[name].add(_order(before[_shown(name)], after[_shown(name)], axes, row))
    (place / "rows.data").unlink(missing_ok=True)
    file.unlink()
    shapes = {value.name: value.shape for value in [*raw.graph.inputs, *(o for n in raw.graph for o in n.outputs)]}
    told = {name: _agreed(orders) for name, orders in found.items()}
    alike = {name: _alike(shapes[name], wanted[name], batch) for name, order in told.items() if order == "shared"}
    return {**told, **{name: order for name, order in alike.items() if order is not None}}


def _alike(shape: ir.Shape | None, axes: int, batch: str) -> AxisOrder | None:
    """Order of rows in a value that has a batch axis and is the same for all rows, such as a repeated table."""
    if shape is None:
        return None
    sizes = [str(size) if isinstance(size, int) else str(size.value) for size in shape]
    leading = sizes if axes == 0 else sizes[:axes]
    if [batch in re.findall(r"[A-Za-z_]\w*", size) for size in sizes].count(True) != 1 or batch not in leading:
        return None
    place = leading.index(batch)
    return "major" if place == 0 else "minor" if place == len(leading) - 1 else None


def _agreed(orders: set[AxisOrder]) -> AxisOrder:
    """Join the orders found by replacing each row; a row that was like its replacement shows nothing."""
    told = orders - {"shared"} or orders
    return told.pop() if len(told) == 1 else "mixed"


def _showing(raw: ir.Model, wanted: Iterable[str]) -> ir.Model:
    model = raw.clone()
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    for name in wanted:
        # Through an Identity: a value that is an input or an output already cannot be an output under the same name.
        node = ir.node("Identity", [values[name]], name=_shown(name))
        node.outputs[0].name = _shown(name)
        node.outputs[0].type, node.outputs[0].shape = values[name].type, values[name].shape
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    return model


def _shown(name: str) -> str:
    return f"{name}.shown"


def _replace(array: Array, row: int) -> Array:
    changed = array.copy()
    changed[row] = array[0]
    return changed


def _order(before: Array, after: Array, axes: int, row: int) -> AxisOrder:
    kept = before.ndim if axes == 0 else axes if axes > 0 else before.ndim + axes
    leading = int(np.prod(before.shape[:kept]))
    different = np.any((before != after).reshape(leading, -1), axis=1)
    changed = np.flatnonzero(different)
    if not changed.size:
        return "shared"
    if leading % _ROWS:
        return "mixed"
    if np.all(changed // (leading // _ROWS) == row):
        return "major"
    return "minor" if np.all(changed % _ROWS == row) else "mixed"
