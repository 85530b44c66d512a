"""A bundle: the base traced once, three graphs that share its weights, and the adapters beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from tpeft_deploy import __version__, slots
from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.bundle import BASE_TASK, MANIFEST, Bundle, check_task
from tpeft_deploy.errors import BundleError, NotEquivalent, UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters import banked, factored, gate
from tpeft_deploy.exporters.bases import Base, load_base, trace
from tpeft_deploy.exporters.folded import write_folded
from tpeft_deploy.exporters.gate import Check
from tpeft_deploy.exporters.graphs import optimize, share_weights, write_weights
from tpeft_deploy.exporters.targets import plan, plan_all, resolve
from tpeft_deploy.files import digest_file, new_directory
from tpeft_deploy.fitting import target_key
from tpeft_deploy.manifest import FileRecord, Manifest, Port, Varies, check_name
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["export_bundle"]

Progress = Callable[[str], None]
Tasks = dict[str, Adapter | None]
DATA = "weights.data"
_MIXED = 6  # given adapters in one mixed batch, so that its size does not grow with their number


def export_bundle(
    base: object,
    adapters: Mapping[str, Adapter],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_rank: int | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    folded: bool = False,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Export a base and adapters for it as a bundle.

    Args:
        base: a torch module, or "package.module:factory".
        adapters: task -> adapter.  The weights that they change get a branch, so that adapters which change the
            same weights can be added later; with no adapters every linear and conv weight gets one.
        path: the directory to write; it must not exist or be empty.
        name: the bundle's name; by default the directory's.
        max_rank: the largest rank of an adapter that the bundle takes; by default any.
        example_inputs: by input name, for a module; the first axis is the batch.
        dynamic_shapes: as `torch.export` takes them; by default the first axis of every input.
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
    loaded = load_base(base, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    _check_batch(loaded)
    for adapter in adapters.values():
        loaded.check(adapter)
    progress("trace the base")
    raw = trace(loaded)
    with new_directory(path) as new:
        progress("write the graphs")
        manifest = replace(_write_graphs(loaded, raw, adapters, new), name=name, max_rank=max_rank)
        _write_manifest(new, manifest)
        bundle = Bundle.open(new)
        for task, adapter in adapters.items():
            bundle.add(task, adapter)
        manifest = _prove(loaded, bundle, adapters, progress)
        for task, adapter in adapters.items() if folded else ():
            progress(f"fold {task}")
            checks = write_folded(loaded, raw, adapter, new / "folded" / f"{task}.onnx", task=task)
            manifest = _with_checks(manifest, checks)
        _write_manifest(new, manifest)
    return Bundle.open(path)


def _prove(base: Base, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress) -> Manifest:
    """The manifest with what the gate measured, and with whether rows of different adapters may share a run."""
    manifest = _with_checks(bundle.manifest, _check(base, bundle, adapters, progress))
    if manifest.rows == "group":
        return manifest
    progress("check rows of different adapters")
    checks, obstacle = _check_mixed(base, bundle, adapters)
    if obstacle is not None:
        return replace(manifest, rows="group", rows_reason=obstacle)
    return _with_checks(manifest, checks)


def _with_checks(manifest: Manifest, checks: Iterable[Check]) -> Manifest:
    return replace(manifest, gate=(*manifest.gate, *(check.to_json() for check in checks)))


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
    targets = plan(raw.graph, adapters, resolved, base=base.name) if adapters else plan_all(raw.graph, resolved)
    held = set(resolved.values())
    digests = {name: weight_digest(raw.graph.initializers[name].const_value.numpy()) for name in sorted(held)}  # type: ignore[union-attr]
    weights = write_weights(raw.graph, digests, place / DATA)
    graphs = {"base.onnx": raw.clone(), "factored.onnx": raw.clone(), "banked.onnx": raw.clone()}
    factored.attach(graphs["factored.onnx"], targets)
    varies = factored.output_axes(graphs["factored.onnx"], targets, raw.graph.outputs)
    single = banked.attach(graphs["banked.onnx"], targets)
    defaults = {slots.input_name(t.name, "value"): t.name for t in targets if t.kind == "override"}
    for file, model in graphs.items():
        _mark_outputs(model, raw, varies if file != "base.onnx" else {})
        optimize(model, keep=[*held, *defaults])
        share_weights(model, weights, defaults, place / DATA)
        model.metadata_props["tpeft.form"] = file.removesuffix(".onnx")
        ir.save(model, place / file)
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
        files={file: _record(place / file) for file in [*graphs, DATA]},
    )


def _check(base: Base, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress) -> Iterator[Check]:
    """Compare every form with torch, one adapter per run, yielding what was measured."""
    tasks: Tasks = {BASE_TASK: None, **adapters}
    progress("check the base, factored and banked forms")
    yield from _check_base(base, bundle)
    factored_session = gate.open_session(bundle.path / "factored.onnx")
    banked_session = gate.open_session(bundle.path / "banked.onnx")
    banks = _banks(bundle, tasks)
    for position, (task, adapter) in enumerate(tasks.items()):
        factors = bundle.factors(task) if adapter is not None else {}
        for inputs in gate.batches(base):
            got = gate.run(factored_session, inputs, factors)
            expected = gate.reference(base, adapter, inputs, list(got))
            yield gate.compare("factored", task, got, expected)
            got = gate.run(banked_session, inputs, banks | {slots.INDEX: np.array([position])})
            yield gate.compare("banked", task, _cut(got, bundle, adapter), expected)


def _check_base(base: Base, bundle: Bundle) -> Iterator[Check]:
    session = gate.open_session(bundle.path / "base.onnx")
    for inputs in gate.batches(base):
        got = gate.run(session, inputs, {})
        yield gate.compare("base", BASE_TASK, got, gate.reference(base, None, inputs, list(got)))


def _check_mixed(base: Base, bundle: Bundle, adapters: Mapping[str, Adapter]) -> tuple[list[Check], str | None]:
    """Compare a batch of rows of different adapters with torch, row by row.

    Two random probes that change every target stand beside the given adapters: those may leave a weight alone, or
    be none at all, and the bundle must be right for the adapters that are added later.

    Returns:
        What was measured and, where rows cannot be mixed, why: then the bundle serves one adapter per run, which
        `_check` has proved.  A layer that lays its rows out in another order than the batch is found here.
    """
    session = gate.open_session(bundle.path / "banked.onnx")
    checks: list[Check] = []
    names = list(adapters)
    for start in range(0, max(len(names), 1), _MIXED):
        chosen: Tasks = {name: adapters[name] for name in names[start : start + _MIXED]}
        tasks: Tasks = {BASE_TASK: None, **chosen, "probe 0": _probe(bundle, 0), "probe 1": _probe(bundle, 1)}
        try:
            checks += _check_rows(base, bundle, session, tasks)
        except gate.ORT_ERRORS as error:
            return [], f"a run of rows of different adapters failed: {str(error).splitlines()[0]}"
        except NotEquivalent as error:
            return [], f"rows of different adapters did not keep apart: expected {error.expected}, got {error.got}"
    return checks, None


def _check_rows(base: Base, bundle: Bundle, session: onnxruntime.InferenceSession, tasks: Tasks) -> Iterator[Check]:
    inputs = gate.with_rows(base, 2 * len(tasks))
    index = np.arange(2 * len(tasks)) % len(tasks)
    got = gate.run(session, inputs, _banks(bundle, tasks) | {slots.INDEX: index})
    for position, (task, adapter) in enumerate(tasks.items()):
        own = {name: array[index == position] for name, array in got.items()}
        expected = gate.reference(base, adapter, inputs, list(got))
        wanted = {name: array[index == position] for name, array in expected.items()}
        yield gate.compare("mixed rows", task, _cut(own, bundle, adapter), wanted)


def _probe(bundle: Bundle, seed: int) -> Adapter:
    """A random adapter of rank 1 that changes every target by a tenth of its norm."""
    random = np.random.default_rng(seed)
    deltas, overrides = {}, {}
    for target in bundle.manifest.targets:
        own = bundle.base_value(target.name)
        size = 0.1 * float(np.linalg.norm(own.astype(np.float64))) or 0.1
        if target.kind == "override":
            noise = random.standard_normal(own.shape)
            overrides[target.name] = (own + size / np.linalg.norm(noise) * noise).astype(own.dtype)
        else:
            factors = tuple(random.standard_normal((mode, 1)) for mode in own.shape)
            delta = TuckerDelta(np.ones((1,) * own.ndim), factors)
            deltas[target.name] = replace(delta, scale=size / delta.norm())
    return Adapter(deltas, {n: a for n, a in overrides.items() if n not in deltas}, source=f"probe {seed}")


def _banks(bundle: Bundle, tasks: Tasks) -> dict[str, Array]:
    filled = [bundle.fill(adapter) if adapter is not None else {} for adapter in tasks.values()]
    banks = {}
    for target in bundle.manifest.targets:
        key = target_key(target)
        default = bundle.default(target)
        for slot in slots.slots_of(target):
            rows = [own.get(key, default)[slot.name] for own in filled]
            banks[slots.input_name(target.name, slot.name)] = slots.stack(rows)
    return banks


def _cut(outputs: gate.Outputs, bundle: Bundle, adapter: Adapter | None) -> gate.Outputs:
    """Take a task's own columns of outputs that were padded to the widest head of the bank."""
    sizes = bundle.sizes(adapter)
    return {
        port.name: outputs[port.name].take(range(sizes[port.name]), axis=port.varies.axis)
        if port.varies
        else outputs[port.name]
        for port in bundle.manifest.outputs
    }


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
