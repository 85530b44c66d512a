"""Write the graphs of a plan, and prove them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.directory import (
    BANKED_CPU,
    BANKED_CUDA,
    BANKED_ROWS,
    CHOICE,
    EXAMPLE,
    FACTORED_CPU,
    FACTORED_CUDA,
    MANIFEST,
    Bundle,
)
from tpeft_deploy.bundle.manifest import FileRecord, Manifest, Port, Varies
from tpeft_deploy.bundle.packing import Packed
from tpeft_deploy.bundle.quantised import Quantised
from tpeft_deploy.bundle.text_files import STATES, Mode, Pooling, write_text
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.bases.generation.image_processor import read_image
from tpeft_deploy.exporters.bases.model_text import has_tokenizer, read_text
from tpeft_deploy.exporters.branches import BLOCKED_BRANCHES, attach_banked, attach_factored
from tpeft_deploy.exporters.branches.blocked import can_block
from tpeft_deploy.exporters.branches.joined import packed, stacked
from tpeft_deploy.exporters.branches.joined.windows import replace_col2im
from tpeft_deploy.exporters.branches.merged import merge
from tpeft_deploy.exporters.folded import write_folded
from tpeft_deploy.exporters.genai_config import GENAI_CONFIG, genai_config
from tpeft_deploy.exporters.graph import batch_axes, top_logits
from tpeft_deploy.exporters.graph.rotary import fuse_rotary
from tpeft_deploy.exporters.graph.weights_and_shapes import clean_up, share_weights, write_weights
from tpeft_deploy.exporters.oracle.limits import limits_of
from tpeft_deploy.exporters.oracle.rounding import measure_rounding
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.planning import Plan, port
from tpeft_deploy.exporters.proof.bundle_graphs import BANKED, BASE, FACTORED, form_of
from tpeft_deploy.exporters.proof.forms_and_rows import prove, with_checks
from tpeft_deploy.exporters.proof.padding import prove_padding
from tpeft_deploy.exporters.quantisation.deviation import measure_deviation
from tpeft_deploy.exporters.quantisation.encode import append_packs, encode
from tpeft_deploy.exporters.quantisation.packs import BLOCK, lay_out_packs
from tpeft_deploy.exporters.resizing import check_vocabulary
from tpeft_deploy.exporters.targets import activations
from tpeft_deploy.files import digest_file
from tpeft_deploy.progress import Progress, Stage

__all__ = ["finish", "write_graphs"]

DATA = "weights.data"
_FURTHER = (DATA, EXAMPLE, GENAI_CONFIG, CHOICE)
_log = logging.getLogger("tpeft_deploy.exporters")


def finish(plan: Plan, sources: Sources, bundle: Bundle, *, folded: bool, progress: Progress) -> None:
    """Prove graphs that were written, fold the adapters if asked to, and write the manifest.

    Args:
        plan: plan of the graphs.
        sources: answers of the training libraries.
        bundle: bundle or component with the graphs; the adapters are stored.
        folded: whether to write folded/<task>.onnx for every adapter.
        progress: called at each stage.

    Raises:
        NotEquivalent: a form differs from its reference.
    """
    adapters, subject = plan.adapters, sources.subject
    manifest = prove(sources, bundle, adapters, progress)
    manifest = prove_padding(subject, bundle, manifest, adapters, plan.padding, progress)
    for position, (task, adapter) in enumerate(adapters.items() if folded else ()):
        progress(Stage(f"fold {task}", position, len(adapters)))
        file = bundle.path / "folded" / f"{task}.onnx"
        limit = limits_of(subject.graph, manifest.rounding, manifest.tolerance)
        checks = write_folded(sources, plan.raw, adapter, file, limit, task=task)
        manifest = with_checks(manifest, checks)
    left_out = {task: dict(adapter.left_out) for task, adapter in adapters.items() if adapter.left_out}
    (bundle.path / MANIFEST).write_text(replace(manifest, left_out=left_out).to_json(), encoding="utf-8")


def write_graphs(
    plan: Plan, subject: Subject, place: Path, tolerance: float | None, pooling: Pooling | Mode | None = None
) -> Manifest:
    """Write the graphs, their weights and the example inputs, and the text of a directory.

    Returns:
        The manifest, without proofs.
    """
    raw, draft = plan.raw, plan.draft
    write_weights(raw.graph, draft.weights, place / DATA)
    codes = lay_out_packs(plan.packs, (place / DATA).stat().st_size)
    append_packs(plan.packs, codes, place / DATA)
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
        for file in (FACTORED_CPU, BANKED_CPU) if plan.choice is None else ():
            merge(graphs[file])
    _encode(plan, graphs)
    packing, stacking = _add_cuda(graphs)
    rows = graphs[BANKED].clone()
    if draft.decoder is not None and attach_banked.read_rows(rows):
        fuse_rotary(rows.graph)
        graphs[BANKED_ROWS] = rows
    defaults = {slots.input_name(t, "value"): t.name for t in targets if t.kind == "override"}
    for file, model in graphs.items():
        _mark_outputs(model, raw, varies if file != BASE else {})
        clean_up(model)
        share_weights(model, {**draft.weights, **codes}, defaults, place / DATA)
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
        decoder=draft.decoder and _write_choice(draft.decoder, raw.graph, place),
        files={file: _record(place / file) for file in (*graphs, *_FURTHER) if (place / file).is_file()},
        rounding=measure_rounding(subject),
        packing=packing,
        stacking=stacking,
        tolerance=tolerance,
        text=_write_text(plan, place, pooling, outputs),
        quantised=_quantised(plan, place),
    )


def _add_cuda(graphs: dict[str, ir.Model]) -> tuple[tuple[Packed, ...], tuple[Packed, ...]]:
    """Add the graphs that only CUDA runs, where they differ; returns the packing and the stacking of the manifest."""
    cuda = graphs[BANKED].clone()
    replaced = replace_col2im(cuda)
    unrolled, spread, packing = packed.unroll(cuda), packed.spread(cuda), packed.pack(cuda)
    if replaced or unrolled or spread or packing:
        graphs[BANKED_CUDA] = cuda
    factored = graphs[FACTORED].clone()
    if stacking := stacked.stack(factored):
        graphs[FACTORED_CUDA] = factored
    return packing, stacking


def _encode(plan: Plan, graphs: Mapping[str, ir.Model]) -> None:
    """Quantise graphs, before some of their products are joined for a device: few bits cannot be."""
    if plan.choice is not None:
        for model in graphs.values():
            encode(model, plan.packs, plan.choice.activations)


def _quantised(plan: Plan, place: Path) -> Quantised | None:
    """Describe the quantisation of graphs that were written, measured on the example inputs."""
    if plan.choice is None or plan.base.floating is None:
        return None
    return Quantised(
        form=plan.choice.form,
        block=BLOCK,
        activations=plan.choice.activations,
        weights=tuple(plan.packs),
        bytes=sum(pack.nbytes for pack in plan.packs.values()),
        outputs=measure_deviation(Subject(plan.base.floating, plan.raw.graph), place / BASE),
    )


def _write_choice(ports: DecoderPorts, graph: ir.Graph, place: Path) -> DecoderPorts:
    """Write the graph that chooses from the logits, and check it; returns the ports that name it."""
    dtype = next(value.dtype for value in graph.outputs if value.name == ports.logits)
    if dtype is None:
        raise UnsupportedBase("export a decoder", expected=f"a dtype of {ports.logits!r}", got="none")
    ir.save(top_logits.choice_graph(ports.vocabulary, dtype), place / CHOICE)
    top_logits.check(place / CHOICE, ports.vocabulary, dtype)
    return replace(ports, choice=CHOICE)


def _write_text(
    plan: Plan, place: Path, pooling: Pooling | Mode | None, outputs: Sequence[Port]
) -> dict[str, FileRecord]:
    directory = plan.base.directory
    if pooling is not None and not any(port.name == STATES and len(port.shape) == 3 for port in outputs):
        raise UnsupportedBase(
            f"export base {plan.base.name} with pooling=",
            expected=f"an output {STATES!r} with the states of a text's tokens",
            got=", ".join(port.name for port in outputs),
        )
    if directory is None or not has_tokenizer(directory):
        if pooling is not None:
            raise UnsupportedBase(
                f"export base {plan.base.name} with pooling=",
                expected="a Hugging Face model directory with a tokenizer",
                got="another base" if directory is None else "one without",
            )
        return {}
    try:
        text = read_text(directory, pooling)
    except UnsupportedBase as error:
        if plan.draft.decoder is not None or pooling is not None:
            raise
        _log.warning("the bundle will have no text: %s", error)
        return {}
    images = plan.base.decoder is not None and plan.base.decoder.features
    return write_text(place / "text", *text, read_image(directory) if images else None)


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
