"""Input names with dots in them, such as `past_key_values.0.key`, which no Python parameter can have.

The torch exporter passes inputs by the parameters of `forward` and names graph inputs after them, each character
that Python does not allow replaced.  So while a module is traced, inputs that share what stands before their first
dot go to the parameter of that name as one dict, and the graph gets the dots back afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

__all__ = ["nest", "restore"]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": 1, "b.0.key": 2, "b.0.value": 3}` as `{"a": 1, "b": {"0.key": 2, "0.value": 3}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        parameter, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(parameter, {})[rest] = value
        else:
            nested[name] = value
    return nested


def restore(graph: ir.Graph, names: Iterable[str]) -> None:
    """Name the inputs of a traced graph as the inputs it was traced with."""
    dotted = {re.sub(r"\W", "_", name): name for name in names}
    for value in graph.inputs:
        value.name = dotted.get(str(value.name), value.name)
