"""Proving a bundle: every form of every task, and rows of different tasks in one run, against the merged base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime

from tpeft_deploy import slots
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import BANKED_CPU, BASE_TASK, FACTORED_CPU, Bundle
from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters import bfloat16, gate
from tpeft_deploy.exporters.bases import Base, Outputs
from tpeft_deploy.exporters.gate import Check
from tpeft_deploy.exporters.samples import Sizes, batch_axis, shapes_to_prove, with_sizes
from tpeft_deploy.manifest import Manifest
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["check_forms", "check_rows", "probe", "prove", "with_checks"]

Progress = Callable[[str], None]
Tasks = dict[str, Adapter | None]
# A graph in bfloat16 has its constants rounded, whatever its weights are; branches must not add to that.
_SLACK = 4
_MIXED = 6  # given adapters in one mixed batch, so that its size does not grow with their number


def prove(base: Base, graph: ir.Graph, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress) -> Manifest:
    """The manifest with what the gate measured, and with whether rows of different adapters may share a run.

    Args:
        base: the oracle.
        graph: its raw graph, for the names of inputs, outputs and free sizes.
        bundle: written already, with the adapters in it.
        adapters: task -> adapter.
        progress: told each stage.

    Raises:
        NotEquivalent: a form differs from the merged base.
    """
    manifest = with_checks(bundle.manifest, check_forms(base, graph, bundle, adapters, progress))
    if manifest.rows == "group":
        return manifest
    progress("check rows of different adapters")
    try:
        return with_checks(manifest, list(check_rows(base, graph, bundle, adapters)))
    except NotEquivalent as error:
        # Which row order a layer has can only be proved by running it: a model that fails here is served one adapter
        # per run, which `check_forms` has proved.
        reason = f"rows of different adapters did not keep apart: {error.problem or f'got {error.got}'}"
        return replace(manifest, rows="group", rows_reason=reason)


def with_checks(manifest: Manifest, checks: Iterable[Check]) -> Manifest:
    """A manifest with more measurements."""
    return replace(manifest, gate=(*manifest.gate, *(check.to_json() for check in checks)))


def check_forms(
    base: Base, graph: ir.Graph, bundle: Bundle, adapters: Mapping[str, Adapter], progress: Progress
) -> Iterator[Check]:
    """Compare the base, factored and banked forms with the merged base, one adapter per run.

    Raises:
        NotEquivalent: one of them differs.
    """
    tasks: Tasks = {BASE_TASK: None, **adapters}
    names = [str(value.name) for value in graph.outputs]
    shapes = shapes_to_prove(base, graph)
    progress("check the base, factored and banked forms")
    session = gate.open_session(bundle.path / "base.onnx")
    limit, rounded = 1e-5, bfloat16.holds(graph)
    for sizes in shapes:
        inputs = with_sizes(base, graph, sizes)
        expected = base.reference(None, inputs, names)
        own = gate.BFLOAT16_LIMIT if rounded else 1e-5
        check = gate.compare("base", BASE_TASK, sizes, gate.run(session, inputs, {}), expected, own)
        limit = max(limit, _SLACK * check.error) if rounded else limit
        yield check
    sessions = {file: gate.open_session(bundle.path / file) for file in _graphs(bundle)}
    banks = _banks(bundle, tasks)
    for position, (task, adapter) in enumerate(tasks.items()):
        factors = bundle.factors(task) if adapter is not None else {}
        for sizes in shapes:
            inputs = with_sizes(base, graph, sizes)
            expected = base.reference(adapter, inputs, names)
            for file, session in sessions.items():
                form = file.removesuffix(".onnx")
                if form.startswith("factored"):
                    yield gate.compare(form, task, sizes, gate.run(session, inputs, factors), expected, limit)
                else:
                    got = gate.run(session, inputs, banks | {slots.INDEX: np.array([position])})
                    yield gate.compare(form, task, sizes, _cut(got, bundle, adapter), expected, limit)


def _graphs(bundle: Bundle) -> list[str]:
    """The graphs with branches: the portable two, and those for the CPU where there are any."""
    own = [file for file in (FACTORED_CPU, BANKED_CPU) if file in bundle.manifest.files]
    return ["factored.onnx", "banked.onnx", *own]


def check_rows(base: Base, graph: ir.Graph, bundle: Bundle, adapters: Mapping[str, Adapter]) -> Iterator[Check]:
    """Compare batches of rows of different adapters with the merged base, row by row.

    Two random probes that change every target stand beside the given adapters: those may leave a weight alone, or be
    none at all, and the bundle must be right for the adapters that are added later.

    Raises:
        NotEquivalent: rows of different adapters do not keep apart.
    """
    batch = batch_axis(graph)
    files = [file for file in _graphs(bundle) if file.startswith("banked")]
    sessions = [gate.open_session(bundle.path / file) for file in files]
    limit = 1e-5
    if bfloat16.holds(graph):
        sizes = shapes_to_prove(base, graph)[0]
        inputs = with_sizes(base, graph, sizes)
        plain = gate.run(gate.open_session(bundle.path / "base.onnx"), inputs, {})
        check = gate.compare(
            "base", BASE_TASK, sizes, plain, base.reference(None, inputs, list(plain)), gate.BFLOAT16_LIMIT
        )
        limit = max(limit, _SLACK * check.error)
    names = list(adapters)
    for start in range(0, max(len(names), 1), _MIXED):
        chosen: Tasks = {name: adapters[name] for name in names[start : start + _MIXED]}
        tasks: Tasks = {BASE_TASK: None, **chosen, "probe 0": probe(bundle, 0), "probe 1": probe(bundle, 1)}
        # Twice each task at the example's sizes; at the others once, and one row more.
        for sizes, count in zip(shapes_to_prove(base, graph), (2 * len(tasks), len(tasks) + 1), strict=False):
            rows = sizes | ({batch: count} if batch is not None else {})
            for session in sessions:
                yield from _check_batch(base, graph, bundle, session, tasks, rows, count, limit)


def _check_batch(
    base: Base,
    graph: ir.Graph,
    bundle: Bundle,
    session: onnxruntime.InferenceSession,
    tasks: Tasks,
    sizes: Sizes,
    count: int,
    limit: float,
) -> Iterator[Check]:
    inputs = with_sizes(base, graph, sizes)
    index = np.arange(count) % len(tasks)
    got = gate.run(session, inputs, _banks(bundle, tasks) | {slots.INDEX: index})
    for position, (task, adapter) in enumerate(tasks.items()):
        own = {name: array[index == position] for name, array in got.items()}
        expected = base.reference(adapter, inputs, list(got))
        wanted = {name: array[index == position] for name, array in expected.items()}
        yield gate.compare("mixed rows", task, sizes, _cut(own, bundle, adapter), wanted, limit)


def probe(bundle: Bundle, seed: int) -> Adapter:
    """A random adapter of rank 1 that changes every target by a tenth of its norm."""
    random = np.random.default_rng(seed)
    deltas, overrides, gains = {}, {}, {}
    for target in bundle.manifest.targets:
        own = bundle.base_value(target.name)
        size = 0.1 * float(np.linalg.norm(own.astype(np.float64))) or 0.1
        if target.part == "override":
            noise = np.abs(random.standard_normal(own.shape))  # a variance stays positive
            overrides[target.name] = (own + size / np.linalg.norm(noise) * noise).astype(own.dtype)
        elif target.part == "delta":
            factors = tuple(random.standard_normal((mode, 1)) for mode in own.shape)
            delta = TuckerDelta(np.ones((1,) * own.ndim), factors)
            deltas[target.name] = replace(delta, scale=size / delta.norm())
        elif target.name not in gains:
            mode = int(target.kind[-1])
            shape = [size if axis == mode else 1 for axis, size in enumerate(own.shape)]
            gains[target.name] = 1 + 0.1 * random.standard_normal(shape)
    kept = {name: array for name, array in overrides.items() if name not in deltas and name not in gains}
    return Adapter(deltas, kept, source=f"probe {seed}", gains=gains)


def _banks(bundle: Bundle, tasks: Tasks) -> dict[str, Array]:
    filled = [bundle.fill(adapter) if adapter is not None else {} for adapter in tasks.values()]
    banks = {}
    for target in bundle.manifest.targets:
        default = bundle.default(target)
        for slot in slots.slots_of(target):
            rows = [own.get(target.key, default)[slot.name] for own in filled]
            banks[slots.input_name(target, slot.name)] = slots.stack(rows)
    return banks


def _cut(outputs: Outputs, bundle: Bundle, adapter: Adapter | None) -> Outputs:
    """Take a task's own columns of outputs that were padded to the widest head of the bank."""
    sizes = bundle.sizes(adapter)
    return {
        port.name: outputs[port.name].take(range(sizes[port.name]), axis=port.varies.axis)
        if port.varies
        else outputs[port.name]
        for port in bundle.manifest.outputs
    }
