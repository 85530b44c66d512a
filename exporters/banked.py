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
from tpeft_deploy.exporters.branches import BRANCHES, Branches, fit_factors, in_order
from tpeft_deploy.exporters.branches.surgery import add_input
from tpeft_deploy.exporters.graphs import forget_shapes
from tpeft_deploy.exporters.rows import Order
from tpeft_deploy.slots import Target

__all__ = ["attach"]


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
    ways = [(t.name, branches[t.kind].banked(model, t, made[t.key], index)) for t in in_order(targets)]
    # Traced shapes say nothing of rows that a shared value gets, or of the heads that tasks bring.
    forget_shapes(model.graph)
    return [name for name, way in ways if way == "group"]
