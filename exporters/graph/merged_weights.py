"""A graph with an adapter's merged tensors in place of the base's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.graph.resolve import held_by, resolve
from tpeft_deploy.exporters.graph.weights_and_shapes import forget_shapes, held_tensor
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.ties import changed_names, settle

__all__ = ["held_changes", "replace_weights"]


def replace_weights(base: Base, model: ir.Model, adapter: Adapter) -> None:
    """Put an adapter's merged tensors in place of a graph's own, each computed when it is written."""
    adapter = held_changes(base, model.graph, adapter)
    for name in changed_names(adapter):
        if name not in model.graph.initializers:
            for node in quantised.nodes_of(quantised.stand_in(model.graph, name)):
                quantised.replace(node, adapter.merged(name, quantised.dequantise(node)))
            continue
        value = model.graph.initializers[name]
        own = held_tensor(model.graph, name)
        shape = adapter.overrides[name].shape if name in adapter.overrides else own.shape.numpy()
        value.shape = ir.Shape(shape)
        merge = partial(_merged, base, adapter, name, own.dtype)
        value.const_value = ir.LazyTensor(merge, own.dtype, ir.Shape(shape), name=name)
    if adapter.overrides:
        replaced = [value for name, value in model.graph.initializers.items() if name in adapter.overrides]
        _infer_outputs(model, replaced)


def held_changes(base: Base, graph: ir.Graph, adapter: Adapter) -> Adapter:
    """The adapter by the names of the initializers that hold the weights it changes.

    Raises:
        UnknownTarget: the graph does not use a weight, or uses it for another module too.
    """
    resolved = resolve(graph, base.weights, base.aliases)
    doing = f"fold {adapter.source} into {base.name}"
    adapter = settle(adapter, resolved, base.ties, doing=doing)
    for name in changed_names(adapter):
        held_by(resolved, name, doing=doing)
    return adapter


def _merged(base: Base, adapter: Adapter, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(base.merged(adapter, name).astype(dtype.numpy()), name=name)


def _infer_outputs(model: ir.Model, replaced: Sequence[ir.Value]) -> None:
    """Replace the traced output shapes by the ones that heads of another size lead to."""
    forget_shapes(model.graph, replaced)
    inferred = passes.ShapeInferencePass()(model.clone()).model
    for value, other in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        value.shape = other.shape
