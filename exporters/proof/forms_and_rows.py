"""Prove a bundle: every form of every task, and rows of different tasks in one run, against the merged base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import onnxruntime

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.bundle.manifest import Manifest, OutputRows
from tpeft_deploy.bundle.tolerances import BRANCH_SLACK, LIMIT, LIMITS
from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.oracle import bfloat16, compare
from tpeft_deploy.exporters.oracle.base import Inputs, Outputs
from tpeft_deploy.exporters.oracle.compare import MERGED, Check
from tpeft_deploy.exporters.oracle.limits import ErrorLimits, limit_of, limits_of
from tpeft_deploy.exporters.oracle.near_ties import explain
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Sizes, Subject
from tpeft_deploy.exporters.proof.bundle_graphs import BASE, banks, feeds_of, graphs_of
from tpeft_deploy.exporters.proof.output_rows import find_output_rows
from tpeft_deploy.progress import Progress, Stage
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = [
    "base_limit",
    "branch_limit",
    "check_forms",
    "check_rows",
    "cut",
    "probe",
    "prove",
    "proved_shapes",
    "with_checks",
]

TaskAdapters = dict[str, Adapter | None]
_MIXED = 6  # given adapters in one mixed batch, so that its size does not grow with their number


def prove(sources: Sources, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress) -> Manifest:
    """Prove a bundle; the manifest gains all measurements, and whether rows of different adapters may share a run.

    Args:
        sources: answers of the training libraries, with the subject that they are about.
        bundle: written already, with the adapters in it.
        adapters: task -> adapter.
        progress: called at each stage.

    Raises:
        NotEquivalent: a form differs from the merged base, or from what its training library computes.
    """
    progress("check which outputs keep rows apart")
    kinds = find_output_rows(sources.subject, bundle.manifest, probe(bundle, 0))
    outputs = tuple(replace(port, rows=kinds[port.name]) for port in bundle.manifest.outputs)
    bundle = replace(bundle, manifest=replace(bundle.manifest, outputs=outputs))
    manifest = _prove_rows(sources, bundle, adapters, progress)
    return _prove_empty(sources, bundle, manifest, adapters, progress)


def _prove_rows(sources: Sources, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress) -> Manifest:
    forms = [check.passed() for check in check_forms(sources, bundle, adapters, progress)]
    manifest = with_checks(replace(bundle.manifest, oracles=sources.to_json(bundle.tasks)), forms)
    if manifest.rows == "group":
        return manifest
    try:
        rows = [check.passed() for check in check_rows(sources.subject, bundle, adapters, progress)]
    except NotEquivalent as error:
        # Which row order a layer has can only be proved by running it: a model that fails here is served one adapter
        # per run, which `check_forms` has proved.
        reason = f"rows of different adapters did not keep apart: {error.problem or f'got {error.got}'}"
        return replace(manifest, rows="group", rows_reason=reason)
    return with_checks(manifest, rows)


def proved_shapes(subject: Subject, manifest: Manifest) -> list[Sizes]:
    """The free sizes to run a bundle at: those of `Subject.shapes`, and with each size of 0 that the bundle takes."""
    return [*subject.shapes, *(subject.shapes[0] | {name: 0} for name in manifest.empty)]


def _prove_empty(
    sources: Sources, bundle: Bundle, manifest: Manifest, adapters: Mapping[str, Adapter], progress: Progress
) -> Manifest:
    """Add the free sizes that may be 0 to the manifest: every form is right there, although a trace may not hold."""
    for name, sizes in sources.subject.empty_shapes.items():
        found: list[Check] = []
        checks = [partial(check_forms, sources, bundle, adapters, progress, [sizes])]
        if manifest.rows == "each":
            checks.append(partial(check_rows, sources.subject, bundle, adapters, progress, [sizes]))
        for check in (check for part in checks for check in part()):
            found.append(check)
            if check.failure is not None:
                break
        else:
            manifest = with_checks(replace(manifest, empty=(*manifest.empty, name)), found)
    return manifest


def with_checks(manifest: Manifest, checks: Iterable[Check]) -> Manifest:
    """A manifest with more measurements: `gate` has those against the merged base, `oracles` the worst of each task."""
    compare, oracles = list(manifest.gate), dict(manifest.oracles)
    for check in checks:
        if check.oracle == MERGED:
            compare.append(check.to_json())
        record = oracles.get(check.task)
        if record is not None and record["oracle"] == check.oracle:
            oracles[check.task] = {**record, "error": max(record["error"], check.error)}
    return replace(manifest, gate=tuple(compare), oracles=oracles)


def check_forms(
    sources: Sources,
    bundle: Bundle,
    adapters: Mapping[str, Adapter],
    progress: Progress,
    shapes: Sequence[Sizes] | None = None,
) -> Iterator[Check]:
    """Compare the base, factored and banked forms with the merged base and with `sources`, one adapter per run.

    Each comparison is made when it is asked for; those that failed are among them.  `shapes` are the free sizes to run
    at, by default those of `proved_shapes`.
    """
    subject = sources.subject
    tasks: TaskAdapters = {BASE_TASK: None, **adapters}
    shapes = proved_shapes(subject, bundle.manifest) if shapes is None else shapes
    progress(Stage("check the base", 0, len(tasks)))
    own = list(_check_base(subject, bundle, shapes))
    yield from own
    limit = _limit(subject, bundle, own)
    files = graphs_of(bundle.manifest, "factored", "banked")
    sessions = {file: compare.open_session(bundle.path / file) for file in files}
    filled = banks(bundle, tasks)
    for position, (task, adapter) in enumerate(tasks.items()):
        progress(Stage(f"check {task}, one adapter per run", position, len(tasks)))
        factors = {file: bundle.factors(task, file) if adapter is not None else {} for file in sessions.keys() - filled}
        source = sources.of(task, adapter)
        for sizes in shapes:
            inputs = subject.inputs(sizes)
            expected = subject.reference(adapter, sizes)
            for file, session in sessions.items():
                if file in filled:
                    extra = feeds_of(file, filled[file], np.array([position]))
                    answer = partial(_run_banked, session, inputs, extra, bundle, adapter)
                else:
                    extra = factors[file]
                    answer = partial(compare.run, session, inputs, extra)
                for check in source.measure(file.removesuffix(".onnx"), task, sizes, answer, expected, limit):
                    yield explain(check, bundle.path / file, {**inputs, **extra})


def branch_limit(subject: Subject, bundle: Bundle, sizes: Sizes) -> ErrorLimits:
    """Limit of a form with branches: in bfloat16, little more than the error of base.onnx at `sizes`."""
    return _limit(subject, bundle, _check_base(subject, bundle, [sizes]) if bfloat16.holds(subject.graph) else [])


def base_limit(subject: Subject, bundle: Bundle) -> ErrorLimits:
    """Limit of base.onnx: fixed in bfloat16, where a copy in float32 is run and rounding is no excuse."""
    if bfloat16.holds(subject.graph):
        return limit_of(subject.graph)
    return limits_of(subject.graph, bundle.manifest.rounding, bundle.manifest.tolerance)


def _check_base(subject: Subject, bundle: Bundle, shapes: Iterable[Sizes]) -> Iterator[Check]:
    session = compare.open_session(bundle.path / BASE)
    for sizes in shapes:
        inputs = subject.inputs(sizes)
        expected = subject.reference(None, sizes)
        answer = partial(compare.run, session, inputs, {})
        check = compare.measure("base", BASE_TASK, sizes, answer, expected, base_limit(subject, bundle))
        yield explain(check, bundle.path / BASE, inputs)


def _limit(subject: Subject, bundle: Bundle, own: Iterable[Check]) -> ErrorLimits:
    """Limit of forms with branches, given the checks of the base."""
    if not bfloat16.holds(subject.graph):
        return base_limit(subject, bundle)
    worst = max((check.error for check in own), default=0.0)
    return max(LIMIT, min(BRANCH_SLACK * worst, LIMITS["bfloat16"]))


def check_rows(
    subject: Subject,
    bundle: Bundle,
    adapters: Mapping[str, Adapter],
    progress: Progress,
    shapes: Sequence[Sizes] | None = None,
) -> Iterator[Check]:
    """Compare batches of rows of different adapters with the merged base, row by row.

    Two random probes that change every target stand beside the given adapters: those may leave a weight alone, or be
    none at all, and the bundle must be right for the adapters that are added later.  As in `check_forms`, comparisons
    that failed are among those that come back, and `shapes` are the free sizes but the batch.
    """
    if all(port.rows == "joint" for port in bundle.manifest.outputs):
        return  # no output may be asked of such a batch
    shapes = proved_shapes(subject, bundle.manifest) if shapes is None else shapes
    limit = branch_limit(subject, bundle, shapes[0])
    files = graphs_of(bundle.manifest, "banked")
    sessions = {file: compare.open_session(bundle.path / file) for file in files}
    names = list(adapters)
    for start in range(0, max(len(names), 1), _MIXED):
        progress(Stage("check rows of different adapters", start, max(len(names), 1)))
        chosen: TaskAdapters = {name: adapters[name] for name in names[start : start + _MIXED]}
        tasks: TaskAdapters = {BASE_TASK: None, **chosen, "probe 0": probe(bundle, 0), "probe 1": probe(bundle, 1)}
        filled = banks(bundle, tasks)
        # Twice each task at the example's sizes; at the others once, and one row more.
        for sizes, count in zip(shapes, (2 * len(tasks), *[len(tasks) + 1] * len(shapes)), strict=False):
            rows = sizes | ({subject.batch: count} if subject.batch is not None else {})
            yield from _check_batch(subject, bundle, sessions, filled, tasks, rows, count, limit)


def _check_batch(
    subject: Subject,
    bundle: Bundle,
    sessions: Mapping[str, onnxruntime.InferenceSession],
    filled: Mapping[str, Mapping[str, Array]],
    tasks: TaskAdapters,
    sizes: Sizes,
    count: int,
    limit: ErrorLimits,
) -> Iterator[Check]:
    inputs = subject.inputs(sizes)
    index = np.arange(count) % len(tasks)
    runs = [
        cache(partial(compare.run, session, inputs, feeds_of(file, filled[file], index)))
        for file, session in sessions.items()
    ]
    kinds = {port.name: port.rows for port in bundle.manifest.outputs}
    for position, (task, adapter) in enumerate(tasks.items()):
        mine = index == position
        # The task's rows alone: a row that depended on others would differ, and the whole batch takes as long again
        # for each task.
        expected = {
            name: array
            for name, array in subject.answer(adapter, _rows_of(bundle.manifest, inputs, mine)).items()
            if kinds[name] != "joint"
        }
        for run in runs:
            answer = partial(_own_rows, run, mine, kinds, bundle, adapter)
            yield compare.measure("mixed rows", task, sizes, answer, expected, limit)


def _rows_of(manifest: Manifest, inputs: Inputs, mine: Array) -> Inputs:
    """Inputs of some rows of a batch."""
    batch, shapes = manifest.batch_axis, {port.name: port.shape for port in manifest.inputs}
    return {
        name: array
        if batch is None or batch not in shapes[name]
        else np.compress(mine, array, shapes[name].index(batch))
        for name, array in inputs.items()
    }


def _own_rows(
    run: Callable[[], Outputs],
    mine: Array,
    kinds: Mapping[str, OutputRows | None],
    bundle: Bundle,
    adapter: Adapter | None,
) -> Outputs:
    # An answer without these rows has a wrong shape, which the comparison says.
    got = {
        name: array[mine] if kinds[name] != "shared" and array.shape[:1] == mine.shape else array
        for name, array in run().items()
    }
    return cut(got, bundle, adapter)


def _run_banked(
    session: onnxruntime.InferenceSession, inputs: Inputs, rows: Outputs, bundle: Bundle, adapter: Adapter | None
) -> Outputs:
    return cut(compare.run(session, inputs, rows), bundle, adapter)


def probe(bundle: Bundle, seed: int) -> Adapter | None:
    """A random adapter of rank 1 that changes every target by a tenth of its norm; None without targets."""
    if not bundle.manifest.targets:
        return None
    random = np.random.default_rng(seed)
    deltas, overrides, gains = dict[str, TuckerDelta](), dict[str, Array](), dict[str, Array]()
    for target in bundle.manifest.targets:
        own, names = bundle.base_value(target.name), bundle.manifest.uses(target.name)
        norm = float(np.linalg.norm(own.astype(np.float64)))
        size = 0.1 * (norm if np.isfinite(norm) else own.shape[0] ** 0.5) or 0.1  # a quantised weight does not tell
        if target.part == "override":
            noise = np.abs(random.standard_normal(own.shape))  # a variance stays positive
            overrides |= dict.fromkeys(names, (own + size / np.linalg.norm(noise) * noise).astype(own.dtype))
        elif target.part == "delta":
            factors = tuple(random.standard_normal((mode, 1)) for mode in own.shape)
            delta = TuckerDelta(np.ones((1,) * own.ndim), factors)
            deltas |= dict.fromkeys(names, replace(delta, scale=size / delta.norm()))
        elif target.name not in gains:
            mode = int(target.kind[-1])
            shape = [size if axis == mode else 1 for axis, size in enumerate(own.shape)]
            gains |= dict.fromkeys(names, 1 + 0.1 * random.standard_normal(shape))
    kept = {name: array for name, array in overrides.items() if name not in deltas and name not in gains}
    return Adapter(deltas, kept, source=f"probe {seed}", gains=gains)


def cut(outputs: Outputs, bundle: Bundle, adapter: Adapter | None) -> Outputs:
    """Take a task's own columns of outputs that were padded to the widest head of the bank."""
    sizes = bundle.sizes(adapter)
    axes = {port.name: port.varies.axis for port in bundle.manifest.outputs if port.varies}
    # Slices, which an output that is too small or has too few axes passes as it is, for the comparison to refuse.
    return {
        name: array[(slice(None),) * axes[name] + (slice(sizes[name]),)]
        if array.ndim > axes.get(name, array.ndim)
        else array
        for name, array in outputs.items()
    }
