"""Input names with dots in them, such as `added_cond_kwargs.time_ids`, which no Python parameter can have.

The torch exporter passes inputs by the parameters of `forward` and names graph inputs after them, each character
that Python does not allow replaced.  So while a module is traced, inputs that share what stands before their first
dot go to the parameter of that name as one dict, and the graph gets the dots back afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

__all__ = ["flatten", "nest", "restore"]


def flatten(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """`{"a": 1, "b": {"c": 2}}` as `{"a": 1, "b.c": 2}`; an axis -> size mapping has integer keys and stays whole."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
            flat |= {f"{name}.{inner}": own for inner, own in flatten(value).items()}
        else:
            flat[name] = value
    return flat


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
