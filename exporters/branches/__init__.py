"""Tucker branches on a base graph: one file a layer kind, each with the verbs `factored` and `banked`.

factored(model, target, slots)              one adapter, whose slots are overridable initializers
banked(model, target, slots, index) -> Rows one bank row per batch row, or per run where a layer cannot do that
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from tpeft_deploy.exporters.branches import conv, linear, override, weight
from tpeft_deploy.manifest import Rows
from tpeft_deploy.slots import Kind, Target

__all__ = ["BRANCHES", "Branch"]

Slots = dict[str, ir.Value]


class Branch(NamedTuple):
    """The verbs of one layer kind."""

    factored: Callable[[ir.Model, Target, Slots], None]
    banked: Callable[[ir.Model, Target, Slots, ir.Value], Rows]


BRANCHES: dict[Kind, Branch] = {
    "linear": Branch(linear.factored, linear.banked),
    "conv": Branch(conv.factored, conv.banked),
    "weight": Branch(weight.factored, weight.banked),
    "override": Branch(override.factored, override.banked),
}
