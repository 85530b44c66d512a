"""Verify a finished bundle: its bytes against their digests, then every form against a merged reference.

Bytes come first: a bundle with an altered file is refused before any of its graphs is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tpeft_deploy.adapter import Adapter, Origin, weight_digest
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import BaseMismatch, FormatError, IntegrityError, ShapeError, UnknownTask, UnsupportedBase
from tpeft_deploy.exporters.bases.bundle import BundleBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.components import component_progress, find_components
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Base
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.oracle.limits import limits_of
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.exporters.proof.bundle_graphs import feed_names, graphs_of
from tpeft_deploy.exporters.proof.forms_and_rows import check_forms, check_rows, proved_shapes
from tpeft_deploy.exporters.proof.padding import check_padding
from tpeft_deploy.exporters.proof.per_target import TargetCheck, check_targets
from tpeft_deploy.exporters.quantisation.dequantised import dequantised
from tpeft_deploy.exporters.verification import Verification, joint
from tpeft_deploy.files import new_file
from tpeft_deploy.formats import origin_of
from tpeft_deploy.formats.base.model import called
from tpeft_deploy.progress import Progress, Stage, silent
from tpeft_deploy.tucker import Array

__all__ = ["Verification", "report_places", "verify_bundle"]

_ROUNDINGS = 4  # of factors and core, in the dtype of the slots


def verify_bundle(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    base: object = None,
    against_source: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Verification:
    """Run the numeric gate again on a finished bundle, on the example inputs stored in it; nothing in it is changed.

    Args:
        path: the bundle.
        task: the only task to check; by default all of them.
        base: exported base, as `export_bundle` takes it, for a reference that is merged and run
            outside ONNX; by default base.onnx with the merged tensors in place of its initializers.
        against_source: the directory or file that the task's adapter was read from: its forms are compared with the
            forward method of the library that wrote it too.  Needs a `base` with a torch module, and `task` where the
            bundle has several.
        report: an HTML file to write, failures included; it also shows the error of every target alone.  A bundle of
            several components has one for each: `report.vision.html`.
        progress: called at each stage.

    Returns:
        What was measured: every check passed.

    Raises:
        UnknownTask: the bundle has no such task.
        IntegrityError: a file was altered, or does not hold what another file says; no graph was run.
        BaseMismatch: `base` is not the bundle's.
        UnsupportedBase, FormatError: the training library cannot be asked about `against_source`.
        NotEquivalent: a form differs from the reference; the report was written.
    """
    bundle = Bundle.open(path)
    if task is not None:
        bundle.digest(task)  # an unknown one is said before anything is read
    origins = _sourced(bundle, task, base, against_source) if against_source is not None else {}
    names = [task] if task is not None else list(bundle.tasks)
    if not bundle.parts:
        return _verify(bundle, names, base, origins, report, progress).passed()
    slots = any(part.manifest.decoder is not None for part in bundle.parts.values())
    components = find_components(called(base), slots) if base is not None else {}
    if components is None or (components and components.keys() != bundle.parts.keys()):
        raise UnsupportedBase(
            f"verify bundle {bundle.path} against a base",
            expected=f"a base with the components {', '.join(bundle.parts)}",
            got="one graph" if components is None else ", ".join(components),
        )
    found, places = {}, report_places(bundle, report) if report is not None else {}
    for name, part in bundle.parts.items():
        loaded = components[name].base(name) if components else None
        place = places[name] if places else None
        found[name] = _verify(part, names, loaded, origins, place, component_progress(name, progress))
    return joint(bundle, found).passed()


def report_places(bundle: Bundle, report: str | os.PathLike[str]) -> dict[str, Path]:
    """Component -> file of its report; of a bundle with several components, `report.vision.html` for `report.html`."""
    several = bool(bundle.parts)
    return {name: Path(report).with_suffix(f".{name}.html") if several else Path(report) for name in bundle.components}


def _verify(
    bundle: Bundle,
    names: list[str],
    base: object,
    sourced: Mapping[str, Origin],
    report: str | os.PathLike[str] | None,
    progress: Progress,
) -> Verification:
    """Verify a bundle of one graph, or one component."""
    whole = _read(bundle, names, progress)
    whole |= {name: replace(whole[name], origin=origin) for name, origin in sourced.items()}
    tasks = {name: part for name, adapter in whole.items() if (part := bundle.part(adapter)) is not None}
    sourced = {name: origin for name, origin in sourced.items() if name in tasks}
    oracle, reference = BundleBase(bundle), "base.onnx with merged weights, not optimised"
    chosen: Base = oracle
    if base is not None:
        progress("load the base")
        loaded = load_base(base, generation=bundle.manifest.decoder is not None)
        chosen = _own_base(bundle, loaded.knowing(tasks.values()))
        reference = f"{chosen.name}, merged and run as it is"
    subject = Subject(chosen, oracle.graph().graph)
    sources = Sources(subject, keep=True, whole=whole)
    reference += "".join(_asked(bundle, sources, name, tasks[name], origin.path) for name, origin in sourced.items())
    checks = list(check_forms(sources, bundle, tasks, progress))
    left_out = _unsourced(tasks, sourced)
    left_out += [
        (f"mixed rows of output {port.name!r}", "it does not keep rows apart: only one task and one caller may ask")
        for port in bundle.manifest.outputs
        if port.rows == "joint"
    ]
    if bundle.manifest.rows == "each":
        checks += check_rows(subject, bundle, tasks, progress)
    else:
        left_out.append(("mixed rows", f"one adapter per run: {bundle.manifest.rows_reason}"))
    if bundle.manifest.paddable:
        progress("check rows that are filled up")
        checks += check_padding(subject, bundle, bundle.manifest, tasks)
    checks += _check_folded(bundle, tasks, progress, sources)
    targets: tuple[TargetCheck, ...] = ()
    if report is not None:
        targets = tuple(check_targets(subject, bundle, tasks, progress))
    found = Verification(bundle, reference, tasks, tuple(checks), targets, tuple(left_out))
    if report is not None:
        from tpeft_deploy.exporters.report import render

        with new_file(Path(report)) as temporary:
            temporary.write_text(render(found), encoding="utf-8")
    return found


def _read(bundle: Bundle, names: list[str], progress: Progress) -> dict[str, Adapter]:
    """The adapters, once every byte that will be used agrees with what is recorded of it."""
    steps = [*bundle.manifest.records, "weights", *names]
    for position, name in enumerate(bundle.manifest.records):
        progress(Stage(f"check the digest of {name}", position, len(steps)))
        bundle.check_file(name)
    for graph in graphs_of(bundle.manifest, "base", "factored", "banked"):
        if graph not in bundle.manifest.files:
            raise IntegrityError(f"open bundle {bundle.path}", expected=f"{graph} in its manifest", got="none")
        _check_ports(bundle, graph)
    progress(Stage("check the digests of the weights", len(bundle.manifest.records), len(steps)))
    for name, weight in bundle.manifest.weights.items():
        if not weight.length:
            continue  # quantised: its bytes are in the graphs, which have digests too
        digest = weight_digest(bundle.base_value(name))
        if digest != weight.digest:
            raise _altered(bundle, f"weight {name!r}", f"digest {weight.digest[:12]}...", f"{digest[:12]}...")
    adapters = {}
    for position, task in enumerate(names):
        progress(Stage(f"check the files of {task}", len(steps) - len(names) + position, len(steps)))
        adapters[task] = bundle.adapter(task)
        _check_native(bundle, task, adapters[task])
    return adapters


def _check_native(bundle: Bundle, task: str, adapter: Adapter) -> None:
    """The .onnx_adapter file feeds exactly what adapter.safetensors stands for.

    An earlier version may have written a change with other ranks; then the changes are compared.
    """
    native, wanted = bundle.native(task), bundle.feeds(adapter)
    for name in sorted({*native, *wanted}):
        if name in native and name in wanted and np.array_equal(native[name], wanted[name]):
            continue
        if _same_change(bundle, name, native, wanted):
            continue
        expected = "the tensor that adapter.safetensors gives" if name in wanted else "no such tensor"
        got = "none" if name not in native else "another" if name in wanted else "one"
        raise _altered(bundle, f"task {task!r}, tensor {name!r} of adapter.onnx_adapter", expected, got)


def _same_change(bundle: Bundle, name: str, native: Mapping[str, Array], wanted: Mapping[str, Array]) -> bool:
    """Whether the slots of the target that takes a tensor have other ranks in two sets, for the same change."""
    for target in bundle.manifest.targets:
        inputs = {slot.name: slots.input_name(target, slot.name) for slot in slots.slots_of(target)}
        if target.part != "delta" or name not in inputs.values():
            continue
        found = [{s: feeds[i] for s, i in inputs.items() if i in feeds} for feeds in (native, wanted)]
        try:
            ranks = [slots.ranks_of(target, tensors) for tensors in found]
        except ShapeError:
            return False
        got, expected = (slots.change_of(target, tensors) for tensors in found)
        limit = np.finfo(target.dtype).eps * _ROUNDINGS * np.linalg.norm(expected)
        return ranks[0] != ranks[1] and bool(np.linalg.norm(got - expected) <= limit)
    return False


def _check_ports(bundle: Bundle, file: str) -> None:
    """Check a graph's inputs and outputs against the manifest."""
    graph, manifest = ir.load(bundle.path / file).graph, bundle.manifest
    fed = {port.name for port in manifest.inputs} | feed_names(manifest, file)
    pairs = {
        "inputs": (fed, {str(value.name) for value in graph.inputs}),
        "outputs": (
            {f"{port.name} in {port.dtype}" for port in manifest.outputs},
            {f"{value.name} in {value.dtype.numpy().name if value.dtype else None}" for value in graph.outputs},
        ),
    }
    for what, (wanted, found) in pairs.items():
        if wanted != found:
            odd = sorted(wanted ^ found)[0]
            where = ("the manifest", "none in the graph") if odd in wanted else ("nothing", "one in the graph")
            raise _altered(bundle, f"{what} of {file}, {odd!r}", f"what {where[0]} names", where[1])


def _altered(bundle: Bundle, what: str, expected: str, got: str) -> IntegrityError:
    return IntegrityError(
        f"verify bundle {bundle.path}, {what}",
        expected=expected,
        got=got,
        fix="The bundle was altered or damaged: export it, or add the adapter, again.",
    )


def _own_base(bundle: Bundle, base: Base) -> Base:
    """A base that was checked to have the bundle's weights, on the bundle's example inputs."""
    weights = base.weights
    for name, weight in bundle.manifest.weights.items():
        digest = weight_digest(weights[name]) if name in weights else None
        if digest != weight.digest:
            raise BaseMismatch(
                f"verify bundle {bundle.path} against base {base.name}, weight {name!r}",
                expected=f"digest {weight.digest[:12]}...",
                got=f"{digest[:12]}..." if digest else "no weight of that name",
                fix="Give the base that the bundle was exported from.",
            )
    if bundle.manifest.quantised is not None:
        nodes = [node for node in BundleBase(bundle).graph().graph if quantised.name_of(node)]
        base = dequantised(base, {str(quantised.name_of(node)): quantised.dequantise(node) for node in nodes})
    return base.at(bundle.example())


def _sourced(bundle: Bundle, task: str | None, base: object, path: str | os.PathLike[str]) -> dict[str, Origin]:
    """The task that a training library is to run, and the files to run."""
    doing = f"verify bundle {bundle.path} against the source {path}"
    names = [task] if task is not None else list(bundle.tasks)
    if len(names) != 1:
        raise UnknownTask(
            doing,
            expected="the task that it is the source of",
            got=f"a bundle of {len(names)} tasks",
            fix="Give task= (--task on the command line).",
        )
    if base is None:
        raise UnsupportedBase(
            doing,
            expected="the torch module that the bundle was exported from, for the training library to run",
            got="none",
            fix="Give base= (--base on the command line).",
        )
    origin = origin_of(Path(path))
    if origin is None:
        raise FormatError(
            doing,
            expected="a PEFT directory, or a .safetensors file of LyCORIS or kohya",
            got="another file or directory, which no training library reads",
        )
    return {names[0]: origin}


def _asked(bundle: Bundle, sources: Sources, task: str, adapter: Adapter, path: object) -> str:
    """Describe the comparison with a source.

    Raises:
        UnsupportedBase: there is no torch module.
        FormatError: the library is not installed, or cannot run the adapter on the base.
    """
    source = sources.of(task, adapter)
    if source.oracle == compare.MERGED:
        doing = f"verify bundle {bundle.path} against the source {path}"
        kind = UnsupportedBase if sources.subject.base.module is None else FormatError
        raise kind(doing, expected="a training library that runs it on the base", got=source.reason)
    return f"; task {task!r} also with the forward of {source.oracle} and {path}"


def _unsourced(tasks: Mapping[str, Adapter], sourced: Mapping[str, Origin]) -> list[tuple[str, str]]:
    others = [task for task in tasks if task not in sourced]
    reasons = [f"no source was given of {', '.join(others)}"] if others else []
    reasons += [f"mixed and padded rows of {task} are compared with merged weights only" for task in sourced]
    return [("training library", reason) for reason in reasons]


def _check_folded(
    bundle: Bundle, tasks: Mapping[str, Adapter], progress: Progress, sources: Sources
) -> Iterator[Check]:
    subject = sources.subject
    shapes = proved_shapes(subject, bundle.manifest)
    limit = limits_of(subject.graph, bundle.manifest.rounding, bundle.manifest.tolerance)
    for position, (task, adapter) in enumerate(tasks.items()):
        file = bundle.path / "folded" / f"{task}.onnx"
        if not file.is_file():
            continue
        progress(Stage(f"check folded {task}", position, len(tasks)))
        session = compare.open_session(file)
        source = sources.of(task, adapter)
        for sizes in shapes:
            answer = partial(compare.run, session, subject.inputs(sizes), {})
            yield from source.measure("folded", task, sizes, answer, subject.reference(adapter, sizes), limit)
