"""The factored form: a base graph with Tucker branches at its targets, their factors overridable.

Nothing fed, it computes the base; fed one adapter's tensors it computes that task, whatever the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.manifest import Varies
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.errors import UnsupportedTarget
from tpeft_deploy.exporters.branches import BRANCHES, Branches, fit_factors, in_order
from tpeft_deploy.exporters.branches.surgery import add_input
from tpeft_deploy.exporters.graph.free_sizes import varies_of
from tpeft_deploy.exporters.graph.weights_and_shapes import forget_shapes
from tpeft_deploy.exporters.oracle import bfloat16

__all__ = ["attach", "output_axes"]


def attach(model: ir.Model, targets: Sequence[Target], branches: Branches = BRANCHES) -> None:
    """Attach a branch for every target to a raw graph, in place."""
    narrow = bfloat16.holds(model.graph)
    made: dict[str, dict[str, ir.Value]] = {}
    for target in in_order(targets):
        neutral = slots.neutral(target) if target.kind != "override" else {}
        values = {}
        for slot in slots.slots_of(target):
            default = neutral.get(slot.name)
            tensor = _own(model, target) if default is None else ir.tensor(default)
            value = add_input(
                model.graph,
                slots.input_name(target, slot.name),
                [f"{target.name}.{size}" if isinstance(size, str) else size for size in slot.shape],
                tensor.dtype,
                tensor,
            )
            values[slot.name] = bfloat16.narrow(model.graph, value) if narrow else value
        made[target.key] = values
    fit_factors(model, targets, made, "TuckerResized")
    for target in in_order(targets):
        branches[target.kind].factored(model, target, made[target.key])
    forget_shapes(model.graph, [made[target.key]["value"] for target in targets if target.kind == "override"])


def output_axes(model: ir.Model, targets: Sequence[Target], outputs: Sequence[ir.Value]) -> dict[str, Varies]:
    """Find the output axes that have an override's size, by shape inference through the functions.

    Args:
        model: a graph that `attach` has worked on.
        targets: attached targets.
        outputs: the raw graph's outputs, with their shapes.

    Raises:
        UnsupportedTarget: an output's size depends on an override in a way that cannot be followed.
    """
    free = {f"{t.name}.C": t.name for t in targets if t.kind == "override" and t.shape}
    if not free:
        return {}
    copy = model.clone()
    passes.InlinePass()(copy)
    _join_biases(copy.graph, targets)
    inferred = passes.ShapeInferencePass()(copy).model
    found: dict[str, Varies] = {}
    for before, after in zip(outputs, inferred.graph.outputs, strict=True):
        if (followed := varies_of(before)) is not None:
            found[str(before.name)] = followed
            continue
        for axis, (old, new) in enumerate(zip(before.shape or (), after.shape or (), strict=False)):
            letter = new.value if isinstance(new, ir.SymbolicDim) else None
            if letter in free:
                found[str(before.name)] = Varies(axis, free[letter])
            elif isinstance(old, int) and old != new:
                raise UnsupportedTarget(
                    f"follow overrides {', '.join(free.values())} to output {before.name!r}",
                    expected=f"axis {axis} to keep its size {old} or to take an override's first size",
                    got=f"{letter or 'a size that shape inference cannot name'}",
                    fix="Give every task a head of the base's size, or export that task folded.",
                )
    return found


def _join_biases(graph: ir.Graph, targets: Sequence[Target], branches: Branches = BRANCHES) -> None:
    """Give the bias of a layer the free size of the layer's matrix: inference cannot know that the two are equal."""
    layers = {t.name.rpartition(".")[0]: t.name for t in targets if t.kind == "override" and len(t.shape) > 1}
    for target in targets:
        layer = layers.get(target.name.rpartition(".")[0])
        if target.kind == "override" and len(target.shape) == 1 and layer is not None:
            value = next(v for v in graph.inputs if v.name == slots.input_name(target, "value"))
            value.shape = ir.Shape([f"{layer}.C"])


def _own(model: ir.Model, target: Target) -> ir.TensorProtocol:
    """The base's own tensor, in the dtype of the target's slots."""
    tensor = model.graph.initializers[target.name].const_value
    if tensor is None:
        raise ValueError("an overridden initializer has no value")
    return ir.tensor(bfloat16.wide(tensor)) if tensor.dtype == ir.DataType.BFLOAT16 else tensor
