"""The folded form: W + dW written into the initializers; a plain ONNX model, as fast as the base."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.quantised import Activations, Quantise
from tpeft_deploy.errors import UnsupportedTarget
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.graph.merged_weights import held_changes, replace_weights
from tpeft_deploy.exporters.graph.resolve import resolve
from tpeft_deploy.exporters.graph.unused import Unused, drop_unused
from tpeft_deploy.exporters.graph.weights_and_shapes import clean_up, fuse_norms, held_tensor, prepare, turn_weights
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.oracle.limits import ErrorLimits, check_tolerance, limits_of
from tpeft_deploy.exporters.oracle.near_ties import explain
from tpeft_deploy.exporters.oracle.rounding import measure_rounding
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.quantisation.encode import encode
from tpeft_deploy.exporters.quantisation.folded import FoldedPacks, describe, pack_folded, reading_checks
from tpeft_deploy.exporters.quantisation.packs import choice_of
from tpeft_deploy.exporters.resizing import fit_vocabulary
from tpeft_deploy.files import move_into, staging
from tpeft_deploy.progress import Progress, silent
from tpeft_deploy.ties import Ties, changed_names

__all__ = ["export_folded", "fold", "plan_folded", "write_folded"]

_log = logging.getLogger("tpeft_deploy.exporters")

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
    rename: Mapping[str, str] | None = None,
    resize_embeddings: bool = False,
    tolerance: float | None = None,
    unused: Unused = "error",
    quantise: Quantise | None = None,
    activations: Activations = "int8",
    progress: Progress = silent,
) -> list[Check]:
    """Export one adapter merged into its base.

    Args:
        base: a torch module, "package.module:factory", a Hugging Face model directory, or an ONNX file.
        adapter: from `load_adapter`.
        path: the ONNX file to write; weights above 100 MB go to `<path>.data` beside it.
        example_inputs: arrays or tensors by input name, for a module or an ONNX file; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        task: the adapter's name, for messages and the model's metadata.
        weights: the original weights of an ONNX file, as `load_base` takes them.
        rename: other names for inputs and outputs: the base's own -> the folded model's.
        resize_embeddings: give the base as many tokens as the adapter has, as `resize_token_embeddings` did before
            it was trained; its new rows are zero.
        tolerance: relative error to accept of weights in float32, from 1e-5, the limit otherwise, to 1e-3; it is
            written into the model's metadata as `tpeft.limit`.
        quantise: "int8" or "int4" to quantise the merged weights, as `export_bundle` does those of a base; the distance
            from the model in floating point is in the file's metadata as `tpeft.quantised`.
        activations: as `export_bundle` takes it.
        unused: "skip" to leave out, with a warning, changes of weights that no output depends on; an error otherwise.
        progress: called at each stage.

    Returns:
        What the numeric gate measured.

    Raises:
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    check_tolerance(tolerance, f"export {path}")
    choice = choice_of(quantise, activations, f"export {path}")
    loaded = load_base(
        base, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, weights=weights, rename=rename
    )
    loaded = fit_vocabulary(loaded, {task: adapter}) if resize_embeddings else loaded
    loaded, raw, adapter = _prepare(*_trace(loaded, adapter, unused, progress))
    progress("fold and check")
    subject = Subject(loaded, raw.graph)
    limit = limits_of(raw.graph, measure_rounding(subject), tolerance)
    packs = pack_folded(loaded, raw, adapter, choice) if choice is not None else None
    return write_folded(Sources(subject), raw, adapter, Path(path), limit, task=task, packs=packs)


def plan_folded(
    base: object,
    adapter: Adapter,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    resize_embeddings: bool = False,
    unused: Unused = "error",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Plan an `export_folded` with the same arguments: the document that a dry run prints.

    Raises:
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch: the base cannot be exported, or the adapter does not
            fit it.
    """
    loaded = load_base(base, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    loaded = fit_vocabulary(loaded, {"adapter": adapter}) if resize_embeddings else loaded
    loaded, raw, adapter = _trace(loaded, adapter, unused, progress)
    targets: list[dict[str, Any]] = []
    adapter = held_changes(loaded, raw.graph, adapter)
    for name in changed_names(adapter):
        own, delta = held_tensor(raw.graph, name), adapter.deltas.get(name)
        shape = adapter.overrides[name].shape if name in adapter.overrides else own.shape.numpy()
        parts = {"delta": adapter.deltas, "gain": adapter.gains, "override": adapter.overrides}
        targets.append(
            {
                "target": name,
                "change": " and ".join(part for part, changes in parts.items() if name in changes),
                "shape": list(shape),
                "ranks": list(delta.ranks) if delta is not None else None,
                "bytes": math.prod(shape) * own.dtype.numpy().itemsize,
                "base_bytes": own.nbytes,
            }
        )
    total = sum(value.const_value.nbytes for value in raw.graph.initializers.values() if value.const_value)
    return {
        "base": loaded.name,
        "base_bytes": total,
        "bytes": total + sum(target["bytes"] - target["base_bytes"] for target in targets),
        "targets": targets,
    }


def _trace(loaded: Base, adapter: Adapter, unused: Unused, progress: Progress) -> tuple[Base, ir.Model, Adapter]:
    loaded = loaded.knowing([adapter])
    loaded.check(adapter)
    progress("trace the base")
    raw = loaded.graph()
    if unused == "skip":
        resolved = resolve(raw.graph, loaded.weights, loaded.aliases)
        adapter = drop_unused(loaded, {adapter.source: adapter}, resolved)[adapter.source]
    return loaded, raw, adapter


def _prepare(loaded: Base, raw: ir.Model, adapter: Adapter) -> tuple[Base, ir.Model, Adapter]:
    """A trace with its graph optimised, for `fold` to put the adapter's tensors into."""
    resolved = resolve(raw.graph, loaded.weights, loaded.aliases)
    overrides = held_changes(loaded, raw.graph, adapter).overrides
    resized = [name for name, array in overrides.items() if array.shape != loaded.weights[name].shape]
    return loaded, prepare(raw, resolved.values(), overrides, resized, folded=True), adapter


def write_folded(
    sources: Sources,
    raw: ir.Model,
    adapter: Adapter,
    path: Path,
    limit: ErrorLimits,
    *,
    task: str,
    packs: FoldedPacks | None = None,
) -> list[Check]:
    """Fold, optimise, save beside `path`, check there, and only then move to `path`.

    With `packs` the file holds them, and is compared with the model that has the values that they stand for.
    """
    subject, merged = sources.subject, packs.adapter if packs is not None else adapter
    # References first: the merged weights that they need are gone before the session takes as much.
    expected = [
        (sizes, subject.reference(merged, sizes)) for sizes in [*subject.shapes, *subject.empty_shapes.values()]
    ]
    source, checks = sources.of(task, adapter), list[Check]()
    if packs is not None:
        checks += [check.passed() for check in reading_checks(subject, adapter, source, limit, task=task)]
        source = replace(source, outputs=())
    model = fold(subject.base, raw, adapter, task=task, packs=packs)
    model.metadata_props["tpeft.oracle"] = source.oracle
    if isinstance(limit, float):
        model.metadata_props["tpeft.limit"] = f"{limit:g}"
    with staging(path.parent) as new:
        file = new / path.name
        large = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value) > LARGE
        ir.save(model, file, external_data=f"{path.name}.data" if large else None)
        del model
        session = compare.open_session(file)
        for sizes, wanted in expected:
            inputs = subject.inputs(sizes)
            answer = partial(compare.run, session, inputs, {})
            for measured in source.measure("folded", task, sizes, answer, wanted, limit):
                check = explain(measured, file, inputs)
                if check.failure is not None and 0 in sizes.values():
                    _log.warning("%s takes no free size of 0: %s", path.name, check.failure)
                else:
                    checks.append(check.passed())
        del session, answer
        if packs is not None:
            describe(subject, adapter, packs, file)
        move_into(path.parent, sorted(new.iterdir(), key=lambda part: part.name == path.name))
    return checks


def fold(base: Base, raw: ir.Model, adapter: Adapter, *, task: str, packs: FoldedPacks | None = None) -> ir.Model:
    """A copy of a prepared graph with an adapter's tensors in place of the base's, or their packs.

    Raises:
        UnknownTarget: the graph does not use a weight that the adapter changes.
    """
    changed = changed_names(held_changes(base, raw.graph, adapter))
    for name in changed:
        if name not in raw.graph.initializers:
            raise UnsupportedTarget(
                f"fold {adapter.source} into {base.name}, weight {name!r}",
                expected="a weight in floating point",
                got="a quantised one, with too few bits to hold the change",
                fix="Export a bundle, with branches beside the weight, or fold first and quantise the result.",
            )
    model = raw.clone()
    _tie(model.graph, base.ties, changed)
    replace_weights(base, model, adapter)
    if packs is not None:
        encode(model, packs.packs, packs.choice.activations)
    fuse_norms(model)
    turn_weights(model.graph)
    clean_up(model)
    model.metadata_props.update({"tpeft.form": "folded", "tpeft.task": task})
    return model


def _tie(graph: ir.Graph, ties: Ties, changed: Iterable[str]) -> None:
    """Let tied weights that stay as they are share one initializer again, so that the file holds them once."""
    for group in ties:
        first, *others = [name for name in group if name in graph.initializers and name not in changed] or [""]
        for name in others:
            graph.initializers[name].replace_all_uses_with(graph.initializers[first])
            del graph.initializers[name]
