"""Tucker branches on a base graph: one file a layer kind, each with the verbs `factored` and `banked`.

factored(model, target, slots)              one adapter; its slots are overridable initializers
banked(model, target, slots, index) -> Rows one bank row per batch row, or per run where a layer cannot do that
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Kind, Target
from tpeft_deploy.exporters.branches import blocked, conv, experts, gain, linear, override, weight
from tpeft_deploy.exporters.branches.surgery import call_first

__all__ = ["BLOCKED_BRANCHES", "BRANCHES", "Branch", "Branches", "fit_factors", "in_order"]

Slots = dict[str, ir.Value]


class Branch(NamedTuple):
    """The verbs of one layer kind."""

    factored: Callable[[ir.Model, Target, Slots], None]
    banked: Callable[[ir.Model, Target, Slots, ir.Value], Rows]


Branches = Mapping[Kind, Branch]

BRANCHES: Branches = {
    "linear": Branch(linear.factored, linear.banked),
    "matmul": Branch(linear.factored, linear.banked),
    "conv": Branch(conv.factored, conv.banked),
    "conv_transpose": Branch(conv.factored, conv.banked),
    "experts": Branch(experts.factored, experts.banked),
    "weight": Branch(weight.factored, weight.banked),
    "gain_0": Branch(gain.factored, gain.banked),
    "gain_1": Branch(gain.factored, gain.banked),
    "override": Branch(override.factored, override.banked),
}


BLOCKED_BRANCHES: Branches = {**BRANCHES, "weight": Branch(blocked.factored, blocked.banked)}
"""Branches of graphs that only the CPU runs."""


def fit_factors(model: ir.Model, targets: Sequence[Target], made: Mapping[str, Slots], function: str) -> None:
    """Where one task changes a matrix and another replaces it, give the change the replacement's size, in place.

    Args:
        model: a graph to which no branch is attached yet.
        targets: targets of all tasks.
        made: the slots of every target by its key.
        function: function that fits a factor.
    """
    replaced = {target.name: made[target.key]["value"] for target in targets if target.kind == "override"}
    for target in targets:
        if target.kind == "linear" and target.name in replaced:
            slots, name = made[target.key], f"{target.name}.up.resized"
            fitted = call_first(model, function, [slots["up"], replaced[target.name]], name=name, like=None)
            fitted.type = slots["up"].type
            slots["up"] = fitted


def in_order(targets: Sequence[Target]) -> list[Target]:
    """Targets in the order in which their branches fit into each other.

    A gain multiplies what a branch of the same weight has added: attached later, the branch comes between.  Vectors
    hold on to the layer before them by its output, and a replaced matrix takes that layer away, so it comes last.
    """
    return sorted(targets, key=_rank)


def _rank(target: Target) -> int:
    if target.part == "override":
        return 1 if len(target.shape) < 2 else 3
    return 2 if target.part == "delta" else 0
