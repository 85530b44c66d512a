"""Match quantised products with the weights of the base: few bits keep a weight near, and all others far."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.bases.foreign import problems
from tpeft_deploy.exporters.bases.foreign.initializer_uses import QUANTISED, modules_of
from tpeft_deploy.exporters.bases.foreign.known_weights import Known
from tpeft_deploy.exporters.bases.foreign.problems import Problem
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.tucker import Array

__all__ = ["find_quantised"]

_NEAR = 0.3  # 4 bits in blocks are off by a tenth of the norm; another weight by more than all of it


def find_quantised(
    graph: ir.Graph, known: Known, rename: Callable[[str], str]
) -> tuple[list[tuple[ir.Node, str]], dict[str, Problem]]:
    """The products with certain weights, and the reasons that the weights of others must not be changed.

    Args:
        graph: graph of the file.
        known: the base's weights.
        rename: from names of the file to names of the base.
    """
    found = [(node, name) for node in quantised.products(graph) if (name := _weight_of(node, known, rename))]
    nodes, names = {id(node) for node, _ in found}, {name for _, name in found}
    obstacles: dict[str, Problem] = {}
    for node in graph:
        if node.op_type not in QUANTISED or id(node) in nodes:
            continue
        modules = {rename(module) for _, module in modules_of(node)}
        held = [str(value.name) for value in node.inputs if value is not None and value.is_initializer()]
        for name in known.shapes:
            module, _, part = name.rpartition(".")
            first = known.first.get(name, name)
            told = (module in modules and part == "weight") or any(other.startswith(name) for other in held)
            if told and first not in names:
                full = known.arrays is not None
                obstacles[first] = problems.quantised(node.op_type, str(node.name), full=full)
    return found, obstacles


def _weight_of(node: ir.Node, known: Known, rename: Callable[[str], str]) -> str | None:
    if known.arrays is None:
        return None
    matrix = quantised.dequantise(node).astype(np.float64)
    names = {known.first.get(name, name) for name, shape in known.shapes.items() if tuple(shape) == matrix.shape}
    apart = {name: _distance(matrix, known.arrays[name]) for name in names}
    near = {name for name, distance in apart.items() if distance <= _NEAR}
    claimed = {f"{rename(module)}.weight" for _, module in modules_of(node)}
    claimed = {known.first.get(name, name) for name in claimed}
    if len(near) > 1 and near & claimed:
        near &= claimed
    if len(near) != 1 or any(distance < 2 * _NEAR for name, distance in apart.items() if name not in near):
        return None
    return near.pop()


def _distance(matrix: Array, weight: Array) -> float:
    size = float(np.linalg.norm(weight.astype(np.float64)))
    return float(np.linalg.norm(matrix - weight)) / size if size else float("inf")
