"""A bundle: the base traced once, three graphs that share its weights, and the adapters beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.directory import BANKED_CPU, BANKED_CUDA, EXAMPLE, FACTORED_CPU, MANIFEST, Bundle
from tpeft_deploy.bundle.manifest import FileRecord, Manifest, Varies
from tpeft_deploy.bundle.text_files import write_text
from tpeft_deploy.errors import BundleError
from tpeft_deploy.exporters.bases.model_text import has_tokenizer, read_text
from tpeft_deploy.exporters.branches import BLOCKED_BRANCHES, attach_banked, attach_factored, packed
from tpeft_deploy.exporters.branches.blocked import can_block
from tpeft_deploy.exporters.folded import write_folded
from tpeft_deploy.exporters.genai_config import GENAI_CONFIG, genai_config
from tpeft_deploy.exporters.graph import batch_axes
from tpeft_deploy.exporters.graph.unused import Unused
from tpeft_deploy.exporters.graph.weights_and_shapes import clean_up, share_weights, write_weights
from tpeft_deploy.exporters.oracle.limits import check_tolerance, limits_of
from tpeft_deploy.exporters.oracle.rounding import measure_rounding
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.planning import Plan, plan_bundle, port
from tpeft_deploy.exporters.proof.bundle_graphs import BANKED, BASE, FACTORED, form_of
from tpeft_deploy.exporters.proof.forms_and_rows import prove, with_checks
from tpeft_deploy.exporters.proof.padding import prove_padding
from tpeft_deploy.exporters.resizing import check_vocabulary
from tpeft_deploy.exporters.targets import activations
from tpeft_deploy.files import digest_file, new_directory
from tpeft_deploy.progress import Progress, Stage, silent

__all__ = ["export_bundle"]

DATA = "weights.data"


def export_bundle(
    base: object,
    adapters: Mapping[str, Adapter],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_rank: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    folded: bool = False,
    weights: object = None,
    rename: Mapping[str, str] | None = None,
    padding: Mapping[str, int | float] | None = None,
    resize_embeddings: bool = False,
    tolerance: float | None = None,
    unused: Unused = "error",
    exclude: Sequence[str] = (),
    generation: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Export a base and adapters for it as a bundle.

    Args:
        base: a torch module, "package.module:factory", a Hugging Face model directory, or an ONNX file.
        adapters: task -> adapter.  The weights that they change get a branch, so that adapters which change the
            same weights can be added later; with no adapters every linear and conv weight gets one.
        path: the directory to write; it must not exist or be empty.
        name: the bundle's name; by default the directory's.
        max_rank: the largest rank of an adapter that the bundle takes; by default any.
        example_inputs: arrays or tensors by input name, for a module or an ONNX file; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        weights: the original weights of an ONNX file, as `load_base` takes them.
        rename: other names for inputs and outputs: the base's own -> the bundle's.
        padding: values by input name to pad rows with along free axes but the batch, so that requests of
            other lengths share a run; refused unless every answer stays as it was.  By default those of a Hugging Face
            text model's configuration, where proved; {} for none.
        resize_embeddings: give the base as many tokens as the adapters have, as `resize_token_embeddings` did before
            they were trained; its new rows are zero.
        unused: "skip" to leave out, with a warning, changes of weights that no output depends on; an error otherwise.
        exclude: names of weights or modules (`*` and `?` included) that no adapter of the bundle may change, now or
            later, such as those that `rows_reason` lists; an adapter that changes one is refused.
        generation: export a causal language model of transformers for generation: with caches of fixed size that are
            updated in place, and for each row the length of its past (the manifest's `decoder`).  A directory's
            tokenizer, chat templates and generation defaults go into the folder text/.
        folded: also write folded/<task>.onnx for every adapter.
        tolerance: relative error to accept of weights in float32, from 1e-5, the limit otherwise, to 1e-3; it is
            written into the manifest.
        progress: called at each stage.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: the directory is not empty, or a name is not allowed.
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BundleError(
            f"export bundle {path}",
            expected="a new or empty directory",
            got="one that holds files",
            fix="Remove it or choose another.",
        )
    check_tolerance(tolerance, f"export bundle {path}")
    plan = plan_bundle(
        base,
        adapters,
        name=name or path.resolve().name,
        max_rank=max_rank,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        weights=weights,
        rename=rename,
        padding=padding,
        resize_embeddings=resize_embeddings,
        unused=unused,
        exclude=exclude,
        generation=generation,
        progress=progress,
    )
    adapters = plan.adapters
    with new_directory(path) as new:
        progress("write the graphs")
        subject = Subject(plan.base, plan.raw.graph)
        bundle = Bundle(new, replace(_write_graphs(plan, subject, new), tolerance=tolerance))
        for position, (task, adapter) in enumerate(adapters.items()):
            progress(Stage(f"store {task}", position, len(adapters)))
            bundle.add(task, adapter)
        sources = Sources(subject, keep=folded)
        manifest = prove(sources, bundle, adapters, progress)
        manifest = prove_padding(subject, bundle, manifest, adapters, plan.padding, progress)
        for position, (task, adapter) in enumerate(adapters.items() if folded else ()):
            progress(Stage(f"fold {task}", position, len(adapters)))
            file, limit = new / "folded" / f"{task}.onnx", limits_of(subject.graph, manifest.rounding, tolerance)
            checks = write_folded(sources, plan.raw, adapter, file, limit, task=task)
            manifest = with_checks(manifest, checks)
        left_out = {task: dict(adapter.left_out) for task, adapter in adapters.items() if adapter.left_out}
        (new / MANIFEST).write_text(replace(manifest, left_out=left_out).to_json(), encoding="utf-8")
        bundle = Bundle.open(new)
    return replace(bundle, path=path)


def _write_graphs(plan: Plan, subject: Subject, place: Path) -> Manifest:
    raw, draft = plan.raw, plan.draft
    text = _write_text(plan, place)
    write_weights(raw.graph, draft.weights, place / DATA)
    targets = draft.targets
    graphs = {BASE: raw.clone(), FACTORED: raw.clone(), BANKED: raw.clone()}
    attach_factored.attach(graphs[FACTORED], targets)
    varies = attach_factored.output_axes(graphs[FACTORED], targets, raw.graph.outputs)
    check_vocabulary(plan.base, plan.adapters, varies)
    orders = batch_axes.find(subject, raw, activations(raw.graph, targets).items(), place)
    single = attach_banked.attach(graphs[BANKED], targets, orders)
    if can_block(raw.graph, targets):
        graphs |= {FACTORED_CPU: raw.clone(), BANKED_CPU: raw.clone()}
        attach_factored.attach(graphs[FACTORED_CPU], targets, BLOCKED_BRANCHES)
        attach_banked.attach(graphs[BANKED_CPU], targets, orders, BLOCKED_BRANCHES)
    cuda = graphs[BANKED].clone()
    unrolled, packing = packed.unroll(cuda), packed.pack(cuda)
    if unrolled or packing:
        graphs[BANKED_CUDA] = cuda
    defaults = {slots.input_name(t, "value"): t.name for t in targets if t.kind == "override"}
    for file, model in graphs.items():
        _mark_outputs(model, raw, varies if file != BASE else {})
        clean_up(model)
        share_weights(model, draft.weights, defaults, place / DATA)
        model.metadata_props["tpeft.form"] = form_of(file)
        ir.save(model, place / file)
    np.savez(place / EXAMPLE, **dict(plan.base.inputs))  # type: ignore[arg-type]  # its stub takes them for flags
    reason = attach_banked.reason_of(list(single))
    reasons = attach_banked.reasons(raw.graph, [t for t in targets if t.name in single], orders)
    if subject.batch is not None and not subject.rows_differ:
        reason = "the rows of the example inputs are all alike, so nothing tells where rows are: give some that differ"
    outputs = tuple(port(value, varies.get(str(value.name))) for value in raw.graph.outputs)
    settings = genai_config(plan.base, draft.inputs, outputs)
    if settings is not None:
        (place / GENAI_CONFIG).write_text(settings, encoding="utf-8")
    return replace(
        draft,
        rows="group" if reason else "each",
        rows_reason=reason,
        rows_reasons=reasons,
        outputs=outputs,
        files={file: _record(place / file) for file in [*graphs, DATA, EXAMPLE, *([GENAI_CONFIG] if settings else [])]},
        rounding=measure_rounding(subject),
        packing=packing,
        text=text,
    )


def _write_text(plan: Plan, place: Path) -> dict[str, FileRecord]:
    directory = plan.base.directory
    if directory is None or not has_tokenizer(directory):
        return {}
    return write_text(place / "text", *read_text(directory))


def _mark_outputs(model: ir.Model, raw: ir.Model, varies: Mapping[str, Varies]) -> None:
    for value, original in zip(model.graph.outputs, raw.graph.outputs, strict=True):
        name = str(original.name)
        shape = list(original.shape or ())
        if name in varies:
            own = varies[name]
            batch_axes = f"{own.times}*{own.override}.C" if own.times > 1 else f"{own.override}.C"
            shape[own.axis] = ir.SymbolicDim(f"{batch_axes} + {own.plus}" if own.plus else batch_axes)
        value.shape, value.type = ir.Shape(shape), original.type


def _record(file: Path) -> FileRecord:
    return FileRecord(digest_file(file), file.stat().st_size)
