"""The folded form: W + dW written into the initializers; a plain ONNX model, as fast as the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters import gate
from tpeft_deploy.exporters.bases import Base
from tpeft_deploy.exporters.gate import Check
from tpeft_deploy.exporters.graphs import optimize
from tpeft_deploy.exporters.loading import load_base
from tpeft_deploy.exporters.replacing import replace_weights
from tpeft_deploy.exporters.samples import shapes_to_prove, with_sizes
from tpeft_deploy.files import move_into, staging

__all__ = ["export_folded", "fold", "write_folded"]

LARGE = 100_000_000  # bytes; a file in one piece is built in memory, twice, and protobuf stops at 2 GiB


def export_folded(
    base: object,
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    example_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    task: str = "adapter",
    weights: object = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Check]:
    """Export one adapter merged into its base.

    Args:
        base: a torch module, "package.module:factory", or the path of an ONNX file.
        adapter: from `load_adapter`.
        path: the ONNX file to write; weights above 100 MB go to `<path>.data` beside it.
        example_inputs: by input name, for a module or an ONNX file; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        weights: the original weights of an ONNX file, as `load_base` takes them.
        task: the adapter's name, for messages and the model's metadata.
        progress: told each stage.

    Returns:
        What the numeric gate measured.

    Raises:
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    loaded = load_base(base, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, weights=weights)
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
        checks = []
        for sizes, wanted in expected:
            got = gate.run(session, with_sizes(base, raw.graph, sizes), {})
            checks.append(gate.compare("folded", task, sizes, got, wanted))
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
