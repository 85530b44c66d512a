"""The graphs of a bundle, and what each takes beside the inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit, slots
from tpeft_deploy.bundle.directory import BANKED_CPU, BANKED_CUDA, BANKED_ROWS, FACTORED_CPU, FACTORED_CUDA, Bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.bundle.packing import Packed, pack
from tpeft_deploy.tucker import Array

__all__ = ["BANKED", "BASE", "FACTORED", "banks", "feed_names", "feeds_of", "form_of", "graphs_of"]

BASE, FACTORED, BANKED = "base.onnx", "factored.onnx", "banked.onnx"
_FURTHER = (FACTORED_CPU, FACTORED_CUDA, BANKED_CPU, BANKED_CUDA, BANKED_ROWS)


def form_of(file: str) -> str:
    """Form of a graph: base, factored or banked."""
    return file.partition(".")[0]


def graphs_of(manifest: Manifest, *forms: str) -> list[str]:
    """Graphs of some forms: portable ones, then those for one device or use that the bundle has."""
    files = [BASE, FACTORED, BANKED, *(file for file in _FURTHER if file in manifest.files)]
    return [file for file in files if form_of(file) in forms]


def feed_names(manifest: Manifest, file: str) -> set[str]:
    """Names of a graph's inputs beside those of the model."""
    if file == BASE:
        return set()
    names = {slots.input_name(target, slot.name) for target in manifest.targets for slot in slots.slots_of(target)}
    for packed in _packing(manifest, file):
        names -= {name for group in packed.members for name in group}
        names.add(packed.name)
    return names | {slots.INDEX} if form_of(file) == "banked" and file != BANKED_ROWS else names


def feeds_of(file: str, bank: Mapping[str, Array], index: Array) -> dict[str, Array]:
    """Feeds of a run of a banked graph beside inputs, given those of `banks`.

    Args:
        file: graph.
        bank: feeds of the graph that `banks` returned.
        index: place of a task, or of the task of each row.
    """
    if file == BANKED_ROWS:
        return {name: array[index] for name, array in bank.items()}
    return {**bank, slots.INDEX: index}


def banks(bundle: Bundle, tasks: Mapping[str, Adapter | None]) -> dict[str, dict[str, Array]]:
    """Feeds of each banked graph beside inputs and index: the factors of every task, in the order of the tasks."""
    default = fit.named(bundle.manifest, {target.key: bundle.default(target) for target in bundle.manifest.targets})
    feeds = [default | (bundle.feeds(adapter) if adapter is not None else {}) for adapter in tasks.values()]
    portable = {name: slots.stack([row[name] for row in feeds]) for name in default}
    found = dict.fromkeys(graphs_of(bundle.manifest, "banked"), portable)
    if BANKED_CUDA in found:
        rows = [pack(bundle.manifest.packing, row, {}) for row in feeds]
        packed = {name: slots.stack([row[name] for row in rows]) for name in rows[0].keys() - default.keys()}
        names = feed_names(bundle.manifest, BANKED_CUDA) & default.keys()
        found[BANKED_CUDA] = {name: portable[name] for name in names} | packed
    return found


def _packing(manifest: Manifest, file: str) -> Sequence[Packed]:
    return {BANKED_CUDA: manifest.packing, FACTORED_CUDA: manifest.stacking}.get(file, ())
