"""The banked form: the same branches reading row `adapter_index[n]` of stacked banks.

`adapter_index` (N,) int64 has N = 1 (one adapter for the whole batch) or N = B (each row its own).  Banks are plain
inputs without defaults, so that a missing one fails loudly.  Row 0 is the base by convention of the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches import BRANCHES, Branches, fit_factors, in_order, lifted
from tpeft_deploy.exporters.branches.surgery import add_input, call, route_around
from tpeft_deploy.exporters.graph import batch_axes
from tpeft_deploy.exporters.graph.batch_axes import AxisOrder
from tpeft_deploy.exporters.graph.weights_and_shapes import forget_shapes
from tpeft_deploy.exporters.oracle import bfloat16
from tpeft_deploy.exporters.oracle.subject import batch_axis
from tpeft_deploy.exporters.targets import activations

__all__ = ["attach", "read_rows", "reasons", "reason_of"]

_SPREADING = {"BankedLinearShared", "BankedShared", "BankedRepeated", "BankedSpread", "BankedLookupShared", "Scan"}
_SINGLE = {"BankedLinear", "BankedLookup"}  # on rows that do not come first, one adapter per run


def attach(
    model: ir.Model, targets: Sequence[Target], orders: Mapping[str, AxisOrder], branches: Branches = BRANCHES
) -> list[str]:
    """Attach a banked branch for every target to a raw graph, in place.

    Args:
        model: changed.
        targets: weights that adapters may change.
        orders: order of rows in each activation, from `batch_axes.find`.

    Returns:
        Weights with branches that take one adapter per run; with none, one run serves rows of different adapters.
    """
    batch_axes.mark(model.graph, orders)
    index = add_input(model.graph, slots.INDEX, ["N"], ir.DataType.INT64)
    made: dict[str, dict[str, ir.Value]] = {}
    for target in in_order(targets):
        dtype = ir.DataType.from_numpy(np.dtype(target.dtype))
        made[target.key] = {
            slot.name: add_input(
                model.graph,
                slots.input_name(target, slot.name),
                ["T", *(f"{target.name}.{size}" if isinstance(size, str) else size for size in slot.shape)],
                dtype,
            )
            for slot in slots.slots_of(target)
        }
    fit_factors(model, targets, made, "BankedResized")
    single = [t for t in in_order(targets) if branches[t.kind].banked(model, t, made[t.key], index) == "group"]
    single = _lifted(model, single, index)
    # Traced shapes say nothing of rows that a shared value gets, or of the heads that tasks bring.
    changed = [made[target.key]["value"] for target in targets if target.kind == "override"]
    changed += [value for node in model.graph if node.op_type in _SPREADING for value in node.outputs]
    forget_shapes(model.graph, changed)
    return [target.name for target in single]


def read_rows(model: ir.Model) -> bool:
    """Let the branches of a banked graph read rows that are gathered already in place of the banks, in place.

    A step of a decoder runs many times on the same rows, and gathering them takes it as long as using them.

    Returns:
        False, and nothing was changed, where a branch is not of a linear layer, or the graph is in bfloat16, which the
        CPU does not run.
    """
    index = next(value for value in model.graph.inputs if value.name == slots.INDEX)
    nodes = [use.node for use in index.uses()]
    if not nodes or bfloat16.holds(model.graph) or any(node.op_type != "BankedLinear" for node in nodes):
        return False
    batch = batch_axis(model.graph)
    for node in nodes:
        y, x, _, down, up = (value for value in node.inputs if value is not None)
        apart = x.shape is not None and len(x.shape) == 3 and x.shape[0] == batch
        function = "TuckerLinear" if apart else "RowsLinear"  # of x (N, m, I), products broadcast along rows
        route_around(node, call(model, function, [y, x, down, up], name=f"{node.name}.rows", like=y, after=node))
        for bank in (down, up):
            bank.shape = ir.Shape(["N", *list(bank.shape or ())[1:]])
    model.graph.inputs.remove(index)
    return True


def reasons(graph: ir.Graph, targets: Sequence[Target], orders: Mapping[str, AxisOrder]) -> dict[str, str]:
    """Find the reason that each of these targets takes one adapter per run.

    Args:
        graph: the raw graph.
        targets: those among the attached that `attach` returned.
        orders: as `attach` took them.
    """
    return {target.name: _why(graph, target, orders) for target in targets}


def _why(graph: ir.Graph, target: Target, orders: Mapping[str, AxisOrder]) -> str:
    if target.kind == "weight":
        return "it is used otherwise than as a layer, so W + dW is computed once per run"
    found = {orders.get(name, "major") for name in activations(graph, [target])}
    if "mixed" in found:
        return "its rows depend on each other, or are laid out in an order that is not known"
    if "shared" in found:
        return "what goes in has no batch axis, and what comes out does not meet the batch by broadcasting"
    if "minor" in found:
        return "the rows are not the first axis of what goes in or comes out"
    return "the tensor is read once per run"


def _lifted(model: ir.Model, single: list[Target], index: ir.Value) -> list[Target]:
    """Lift branches on values that all rows share; what is left takes one adapter per run."""
    batch = batch_axis(model.graph)
    waiting = {target.key: _waiting(model.graph, target) for target in single if target.kind in ("linear", "matmul")}
    shared = [node for nodes in waiting.values() for node in nodes if _order(node) == "shared"]
    if batch is None or not shared:
        return single
    done = set(lifted.lift(model, shared, index, batch))
    return [target for target in single if not waiting.get(target.key) or not done.issuperset(waiting[target.key])]


def _waiting(graph: ir.Graph, target: Target) -> list[ir.Node]:
    """The branches of a target that take one adapter per run."""
    own = (node for node in graph if node.op_type in _SINGLE and str(node.name).startswith(f"{target.name}.banked."))
    return [node for node in own if _order(node) != "major"]


def _order(node: ir.Node) -> AxisOrder:
    x = node.inputs[1]
    return batch_axes.order_of(x) if x is not None else "mixed"


def reason_of(single: Sequence[str]) -> str:
    """Reason that a bundle takes one adapter per run: the weights that do; empty where there are none."""
    return f"one adapter per run at {', '.join(single)}; --exclude leaves a weight out" if single else ""
