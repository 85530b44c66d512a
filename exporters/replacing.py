"""A graph with an adapter's merged tensors in place of the base's own."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters import quantised
from tpeft_deploy.exporters.bases import Base
from tpeft_deploy.exporters.graphs import forget_shapes, held_tensor
from tpeft_deploy.exporters.targets import held_by, resolve

__all__ = ["held_weights", "replace_weights"]


def replace_weights(base: Base, model: ir.Model, adapter: Adapter) -> None:
    """Put an adapter's merged tensors in place of a graph's own, each computed when it is written."""
    for name, held in held_weights(base, model.graph, adapter).items():
        if held not in model.graph.initializers:
            for node in quantised.nodes_of(quantised.stand_in(model.graph, held)):
                quantised.replace(node, adapter.merged(name, quantised.dequantise(node)))
            continue
        value = model.graph.initializers[held]
        own = held_tensor(model.graph, held)
        shape = adapter.overrides[name].shape if name in adapter.overrides else own.shape.numpy()
        value.shape = ir.Shape(shape)
        merge = partial(_merged, base, adapter, name, own.dtype)
        value.const_value = ir.LazyTensor(merge, own.dtype, ir.Shape(shape), name=held)
    if adapter.overrides:
        _infer_outputs(model)


def held_weights(base: Base, graph: ir.Graph, adapter: Adapter) -> dict[str, str]:
    """Every weight that an adapter changes -> the initializer that holds it.

    Raises:
        UnknownTarget: the graph does not use the weight.
    """
    resolved = resolve(graph, base.weights, base.aliases)
    doing = f"fold {adapter.source} into {base.name}"
    changed = dict.fromkeys([*adapter.deltas, *adapter.gains, *adapter.served_overrides])
    return {name: held_by(resolved, name, doing=doing) for name in changed}


def _merged(base: Base, adapter: Adapter, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(base.merged(adapter, name).astype(dtype.numpy()), name=name)


def _infer_outputs(model: ir.Model) -> None:
    """Replace the traced output shapes by the ones that heads of another size lead to."""
    forget_shapes(model.graph)
    inferred = passes.ShapeInferencePass()(model.clone()).model
    for value, other in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        value.shape = other.shape
