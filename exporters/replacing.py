"""A graph with an adapter's merged tensors in place of the base's own."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters.bases import Base
from tpeft_deploy.exporters.graphs import forget_shapes
from tpeft_deploy.exporters.targets import held_by, resolve

__all__ = ["replace_weights"]


def replace_weights(base: Base, model: ir.Model, adapter: Adapter) -> None:
    """Put an adapter's merged tensors in place of a graph's own, each computed when it is written."""
    resolved = resolve(model.graph, base.weights, base.aliases)
    for name in dict.fromkeys([*adapter.deltas, *adapter.gains, *adapter.served_overrides]):
        value = model.graph.initializers[held_by(resolved, name, doing=f"fold {adapter.source} into {base.name}")]
        own = value.const_value
        if own is None:
            raise ValueError(f"initializer {value.name!r} has no value")
        shape = adapter.overrides[name].shape if name in adapter.overrides else own.shape.numpy()
        value.shape = ir.Shape(shape)
        value.const_value = ir.LazyTensor(
            partial(_merged, base, adapter, name), own.dtype, ir.Shape(shape), name=value.name
        )
    if adapter.overrides:
        _infer_outputs(model)


def _merged(base: Base, adapter: Adapter, name: str) -> ir.TensorProtocol:
    return ir.tensor(base.merged(adapter, name), name=name)


def _infer_outputs(model: ir.Model) -> None:
    """Replace the traced output shapes by the ones that heads of another size lead to."""
    forget_shapes(model.graph)
    inferred = passes.ShapeInferencePass()(model.clone()).model
    for value, other in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        value.shape = other.shape
