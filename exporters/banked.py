"""The banked form: the same branches reading row `adapter_index[n]` of stacked banks.

`adapter_index` (N,) int64 has N = 1 (one adapter for the whole batch) or N = B (each row its own).  Banks are plain
inputs without defaults, so that a missing one fails loudly.  Row 0 is the base by convention of the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tpeft_deploy import slots
from tpeft_deploy.exporters import rows
from tpeft_deploy.exporters.branches import BRANCHES, Branches, in_order, lifted
from tpeft_deploy.exporters.branches.surgery import add_input
from tpeft_deploy.exporters.graphs import forget_shapes
from tpeft_deploy.exporters.rows import Order
from tpeft_deploy.exporters.samples import batch_axis
from tpeft_deploy.slots import Target

__all__ = ["attach"]

_LIFTED = {"BankedLinear", "BankedLookup"}


def attach(
    model: ir.Model, targets: Sequence[Target], orders: Mapping[str, Order], branches: Branches = BRANCHES
) -> list[str]:
    """Attach a banked branch for every target to a raw graph, in place.

    Args:
        model: changed.
        targets: what adapters may change.
        orders: where the rows are in the activations, from `rows.find`.

    Returns:
        The weights whose branches take one adapter per run; with none, one run serves rows of different adapters.
    """
    rows.mark(model.graph, orders)
    index = add_input(model.graph, slots.INDEX, ["N"], ir.DataType.INT64)
    single: list[str] = []
    for target in in_order(targets):
        dtype = ir.DataType.from_numpy(np.dtype(target.dtype))
        values = {
            slot.name: add_input(
                model.graph,
                slots.input_name(target, slot.name),
                ["T", *(f"{target.name}.{size}" if isinstance(size, str) else size for size in slot.shape)],
                dtype,
            )
            for slot in slots.slots_of(target)
        }
        if branches[target.kind].banked(model, target, values, index) == "group":
            single.append(target.name)
    single = _lifted(model, single, index)
    # Traced shapes say nothing of rows that a shared value gets, or of the heads that tasks bring.
    forget_shapes(model.graph)
    return single


def _lifted(model: ir.Model, single: list[str], index: ir.Value) -> list[str]:
    """Lift branches on values that all rows share; what is left takes one adapter per run."""
    batch = batch_axis(model.graph)
    ours = [node for node in model.graph if node.op_type in _LIFTED and index in node.inputs and not _has_rows(node)]
    if batch is None or not single or not ours:
        return single
    done = lifted.lift(model, ours, index, batch)
    left = {str(node.name).rpartition(".banked.")[0] for node in ours if node not in done}
    return [
        name for name in single if name in left or name not in {str(n.name).rpartition(".banked.")[0] for n in ours}
    ]


def _has_rows(node: ir.Node) -> bool:
    x = node.inputs[1]
    return x is None or rows.order_of(x) in ("major", "minor")
