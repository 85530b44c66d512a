"""A bundle: the base traced once, three graphs that share its weights, and the adapters beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tpeft_deploy import __version__, slots
from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.bundle import EXAMPLE, MANIFEST, Bundle, check_task
from tpeft_deploy.errors import BundleError, UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters import banked, factored, rows
from tpeft_deploy.exporters.bases import Base
from tpeft_deploy.exporters.folded import write_folded
from tpeft_deploy.exporters.graphs import optimize, share_weights, write_weights
from tpeft_deploy.exporters.loading import load_base
from tpeft_deploy.exporters.proof import prove, with_checks
from tpeft_deploy.exporters.targets import activations, plan, plan_all, resolve
from tpeft_deploy.files import digest_file, new_directory
from tpeft_deploy.manifest import FileRecord, Manifest, Port, Varies, check_name

__all__ = ["export_bundle"]

Progress = Callable[[str], None]
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
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Export a base and adapters for it as a bundle.

    Args:
        base: a torch module, "package.module:factory", or the path of an ONNX file.
        adapters: task -> adapter.  The weights that they change get a branch, so that adapters which change the
            same weights can be added later; with no adapters every linear and conv weight gets one.
        path: the directory to write; it must not exist or be empty.
        name: the bundle's name; by default the directory's.
        max_rank: the largest rank of an adapter that the bundle takes; by default any.
        example_inputs: by input name, for a module or an ONNX file; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
        weights: the original weights of an ONNX file, as `load_base` takes them.
        folded: also write folded/<task>.onnx for every adapter.
        progress: told each stage.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: the directory is not empty, or a name is not allowed.
        UnsupportedBase, UnknownTarget, ShapeError, BaseMismatch, NotEquivalent: nothing was written.
    """
    path = Path(path)
    name = check_name(name or path.resolve().name, "bundle")
    for task in adapters:
        check_task(task, name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BundleError(
            f"export bundle {path}",
            expected="a new or empty directory",
            got="one that holds files",
            fix="Remove it or choose another.",
        )
    loaded = load_base(base, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, weights=weights)
    loaded = loaded.knowing(adapters.values())
    _check_batch(loaded)
    for adapter in adapters.values():
        loaded.check(adapter)
    progress("trace the base")
    raw = loaded.graph()
    with new_directory(path) as new:
        progress("write the graphs")
        manifest = replace(_write_graphs(loaded, raw, adapters, new), name=name, max_rank=max_rank)
        _write_manifest(new, manifest)
        bundle = Bundle.open(new)
        for task, adapter in adapters.items():
            bundle.add(task, adapter)
        manifest = prove(loaded, raw.graph, bundle, adapters, progress)
        for task, adapter in adapters.items() if folded else ():
            progress(f"fold {task}")
            checks = write_folded(loaded, raw, adapter, new / "folded" / f"{task}.onnx", task=task)
            manifest = with_checks(manifest, checks)
        _write_manifest(new, manifest)
    return Bundle.open(path)


def _check_batch(base: Base) -> None:
    if not base.batched:
        raise UnsupportedBase(
            f"export bundle of {base.name}",
            expected="an input whose first axis is dynamic: the batch, whose rows choose their adapters",
            got="dynamic_shapes that fix it for all inputs",
            fix="Leave dynamic_shapes out, or make axis 0 dynamic; export_folded takes fixed batches.",
        )


def _write_graphs(base: Base, raw: ir.Model, adapters: Mapping[str, Adapter], place: Path) -> Manifest:
    resolved = resolve(raw.graph, base.weights, base.aliases)
    certain = {name: held for name, held in resolved.items() if base.proves(name)}
    targets = plan(raw.graph, adapters, certain, base=base.name) if adapters else plan_all(raw.graph, certain)
    held = set(resolved.values())
    digests = {name: weight_digest(raw.graph.initializers[name].const_value.numpy()) for name in sorted(held)}  # type: ignore[union-attr]
    weights = write_weights(raw.graph, digests, place / DATA)
    graphs = {"base.onnx": raw.clone(), "factored.onnx": raw.clone(), "banked.onnx": raw.clone()}
    factored.attach(graphs["factored.onnx"], targets)
    varies = factored.output_axes(graphs["factored.onnx"], targets, raw.graph.outputs)
    orders = rows.find(base, raw, activations(raw.graph, targets).items(), place)
    single = banked.attach(graphs["banked.onnx"], targets, orders)
    defaults = {slots.input_name(t, "value"): t.name for t in targets if t.kind == "override"}
    for file, model in graphs.items():
        _mark_outputs(model, raw, varies if file != "base.onnx" else {})
        optimize(model, keep=[*held, *defaults])
        share_weights(model, weights, defaults, place / DATA)
        model.metadata_props["tpeft.form"] = file.removesuffix(".onnx")
        ir.save(model, place / file)
    np.savez(place / EXAMPLE, **dict(base.inputs))  # type: ignore[arg-type]  # its stub takes them for flags
    return Manifest(
        name="unnamed",
        producer=f"tpeft-deploy {__version__}",
        weights=weights,
        aliases={alias: name for alias, name in resolved.items() if alias != name},
        targets=tuple(targets),
        rows="group" if single else "each",
        rows_reason=f"one adapter per run at {', '.join(single)}" if single else "",
        inputs=tuple(_port(value, None) for value in raw.graph.inputs),
        outputs=tuple(_port(value, varies.get(str(value.name))) for value in raw.graph.outputs),
        files={file: _record(place / file) for file in [*graphs, DATA, EXAMPLE]},
    )


def _mark_outputs(model: ir.Model, raw: ir.Model, varies: Mapping[str, Varies]) -> None:
    for value, original in zip(model.graph.outputs, raw.graph.outputs, strict=True):
        name = str(original.name)
        shape = list(original.shape or ())
        if name in varies:
            shape[varies[name].axis] = ir.SymbolicDim(f"{varies[name].override}.C")
        value.shape, value.type = ir.Shape(shape), original.type


def _port(value: ir.Value, varies: Varies | None) -> Port:
    if value.shape is None or value.dtype is None:
        raise UnsupportedTarget(f"describe input or output {value.name!r}", problem="the exporter gave it no shape")
    shape = tuple(
        size if isinstance(size, int) else str(size.value or f"{value.name}.{axis}")
        for axis, size in enumerate(value.shape)
    )
    return Port(str(value.name), value.dtype.numpy().name, shape, varies)


def _record(file: Path) -> FileRecord:
    return FileRecord(digest_file(file), file.stat().st_size)


def _write_manifest(place: Path, manifest: Manifest) -> None:
    (place / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
