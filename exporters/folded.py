"""The folded form: W + dW written into the initializers; a plain ONNX model, as fast as the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters import bfloat16, gate
from tpeft_deploy.exporters.bases import Base
from tpeft_deploy.exporters.gate import Check
from tpeft_deploy.exporters.graphs import forget_shapes, optimize
from tpeft_deploy.exporters.loading import load_base
from tpeft_deploy.exporters.samples import shapes_to_prove, with_sizes
from tpeft_deploy.exporters.targets import held_by, resolve
from tpeft_deploy.files import move_into, staging

__all__ = ["export_folded", "fold", "replace_weights", "write_folded"]

LARGE = 100_000_000  # bytes; a file in one piece is built in memory, twice, and protobuf stops at 2 GiB


def export_folded(
    base: object,
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    task: str = "adapter",
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Check]:
    """Export one adapter merged into its base.

    Args:
        base: a torch module, or "package.module:factory".
        adapter: from `load_adapter`.
        path: the ONNX file to write; weights above 100 MB go to `<path>.data` beside it.
        example_inputs: by input name, for a module; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        task: the adapter's name, for messages and the model's metadata.
        progress: told each stage.

    Returns:
        What the numeric gate measured.

    Raises:
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    loaded = load_base(base, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    loaded = loaded.knowing([adapter])
    loaded.check(adapter)
    progress("trace the base")
    raw = loaded.graph()
    progress("fold and check")
    return write_folded(loaded, raw, adapter, Path(path), task=task)


def write_folded(base: Base, raw: ir.Model, adapter: Adapter, path: Path, *, task: str) -> list[Check]:
    """Fold, optimise, save beside `path`, check there, and only then move to `path`."""
    names = [str(value.name) for value in raw.graph.outputs]
    # References first: the merged weights that they need are gone before the session takes its own.
    expected = [
        (sizes, base.reference(adapter, with_sizes(base, raw.graph, sizes), names))
        for sizes in shapes_to_prove(base, raw.graph)
    ]
    model = fold(base, raw, adapter, task=task)
    with staging(path.parent) as new:
        file = new / path.name
        large = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value) > LARGE
        ir.save(model, file, external_data=f"{path.name}.data" if large else None)
        del model
        session = gate.open_session(file)
        limit = gate.BFLOAT16_LIMIT if bfloat16.holds(raw.graph) else 1e-5
        checks = []
        for sizes, wanted in expected:
            got = gate.run(session, with_sizes(base, raw.graph, sizes), {})
            checks.append(gate.compare("folded", task, sizes, got, wanted, limit))
        del session
        move_into(path.parent, sorted(new.iterdir(), key=lambda part: part.name == path.name))
    return checks


def fold(base: Base, raw: ir.Model, adapter: Adapter, *, task: str) -> ir.Model:
    """A copy of a raw graph with an adapter's tensors in place of the base's, optimised.

    Raises:
        UnknownTarget: the graph does not use a weight that the adapter changes.
    """
    model = raw.clone()
    replace_weights(base, model, adapter)
    optimize(model, inline=True)
    model.metadata_props.update({"tpeft.form": "folded", "tpeft.task": task})
    return model


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
            partial(_merged, base, adapter, name, own.dtype), own.dtype, ir.Shape(shape), name=value.name
        )
    if adapter.overrides:
        _infer_outputs(model)


def _merged(base: Base, adapter: Adapter, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(base.merged(adapter, name).astype(dtype.numpy()), name=name)


def _infer_outputs(model: ir.Model) -> None:
    """Replace the traced output shapes by the ones that heads of another size lead to."""
    forget_shapes(model.graph)
    inferred = passes.ShapeInferencePass()(model.clone()).model
    for value, other in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        value.shape = other.shape
