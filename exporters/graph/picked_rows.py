"""Limits of inputs that index rows of a weight, such as token ids.

ONNX Runtime's CPU refuses an index past the end in the middle of a run; CUDA says nothing and computes an answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["limits"]

_LOOKUPS = {"Gather": "axis", "GatherBlockQuantized": "gather_axis"}  # with the attribute that says along what
# Operators that keep every value of their first input, and add none.
_KEEPING = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def limits(graph: ir.Graph, replaceable: frozenset[str] = frozenset()) -> dict[str, int]:
    """Find the inputs that pick rows of weights.

    Args:
        graph: raw graph, every weight with its shape.
        replaceable: weights that tasks replace by others, which may have another number of rows.

    Returns:
        Input name -> rows of the smallest weight that it picks from.
    """
    found = {str(value.name): min(_rows(value, replaceable), default=None) for value in graph.inputs}
    return {name: rows for name, rows in found.items() if rows is not None}


def _rows(value: ir.Value, replaceable: frozenset[str]) -> Iterator[int]:
    for node, place in value.uses():
        if node.op_type in _LOOKUPS and place == 1:
            table = _weight(node.inputs[0])
            if table is not None and table.shape is not None and table.name not in replaceable:
                size = table.shape[node.attributes.get_int(_LOOKUPS[node.op_type], 0)]
                if isinstance(size, int):
                    yield size
        elif node.op_type in _KEEPING and place == 0 and _keeps_indices(node):
            yield from _rows(node.outputs[0], replaceable)


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a table is, or is dequantised from; None for anything else."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "DequantizeLinear":
        return _weight(node.inputs[0])
    return value if value is not None and value.is_initializer() else None


def _keeps_indices(node: ir.Node) -> bool:
    return node.op_type != "Cast" or node.attributes.get_int("to", 0) in {ir.DataType.INT32, ir.DataType.INT64}
