"""Detect the outputs that keep the rows of a batch apart by changing single rows of the base's inputs.

A contrastive model scores every row against every other, a mean over the batch belongs to none of its rows: such an
output has no meaning for rows of different tasks, or of different callers.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.manifest import Manifest, OutputRows
from tpeft_deploy.bundle.tolerances import LIMIT
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Inputs
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.tucker import Array

__all__ = ["find_output_rows"]

_ROWS = (3, 5)  # of a run at each proof shape; other numbers of rows tell an axis of rows from one that is as long


def find_output_rows(subject: Subject, manifest: Manifest, probe: Adapter | None) -> dict[str, OutputRows | None]:
    """Find `Port.rows` of every output; None where the rows of the example do not tell.

    Args:
        subject: base to run.
        manifest: description of the outputs.
        probe: adapter that changes every weight that an adapter may change.
    """
    batch = str(manifest.batch_axis)
    found: dict[str, set[OutputRows | None]] = {name: set() for name in subject.outputs}
    for sizes, rows in zip(subject.shapes, _ROWS, strict=False):
        inputs = subject.inputs(sizes | {batch: rows})
        before, adapted = (subject.answer(adapter, inputs) for adapter in (None, probe))
        for row in (1, rows - 1):
            changed = _with_row_changed(manifest, inputs, row)
            seen = any(not np.array_equal(changed[name], inputs[name]) for name in inputs)
            after = subject.answer(None, changed)
            for port in manifest.outputs:
                own, axes = (before[port.name], after[port.name]), manifest.batch_axes(port)
                if axes == [0] or (not axes and isinstance(next(iter(port.shape), 0), str) and len(own[0]) == rows):
                    found[port.name].add(_of_rows(own, rows, row) if seen else None)
                else:
                    steady = _alike(adapted[port.name], own[0]) and _alike(own[1], own[0])
                    found[port.name].add("shared" if steady and not axes else "joint")
    return {name: _agreed(kinds) for name, kinds in found.items()}


def _of_rows(runs: tuple[Array, Array], rows: int, row: int) -> OutputRows:
    """Whether an output with an axis of rows, before and after one was replaced, has the others as before."""
    before, after = runs
    others = np.arange(rows) != row
    return "each" if len(before) == rows and _alike(after[others], before[others]) else "joint"


def _agreed(kinds: set[OutputRows | None]) -> OutputRows | None:
    if "joint" in kinds:
        return "joint"
    return next(iter(kinds)) if len(kinds) == 1 else None


def _with_row_changed(manifest: Manifest, inputs: Inputs, row: int) -> dict[str, Array]:
    """The inputs with the first row, numbers with a fraction a little smaller, in place of another."""
    changed = {name: array.copy() for name, array in inputs.items()}
    for port in manifest.inputs:
        array = changed[port.name]
        if port.shape[:1] == (manifest.batch_axis,):
            array[row] = array[0] * np.asarray(0.75, array.dtype) if array.dtype.kind == "f" else array[0]
    return changed


def _alike(got: Array, expected: Array) -> bool:
    return got.shape == expected.shape and compare.relative_error(got, expected) <= LIMIT
