"""The adapters resident on the device, stacked: one row each, row 0 the base.

A `Bank` never changes: loading or unloading a task makes a new one, and runs that hold the old one finish on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnxruntime

from tpeft_deploy import slots
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import BASE_TASK, Bundle
from tpeft_deploy.errors import UnknownTask
from tpeft_deploy.tucker import Array

__all__ = ["Bank", "Resident", "build", "make_resident"]


@dataclass(frozen=True)
class Resident:
    """One adapter in host memory, in the layout of the graph.

    Args:
        digest: of the adapter, or None for one loaded from outside the bundle.
        tensors: target key -> slot -> array, from `Bundle.fill`.
        sizes: output -> size of its varying axis for this task, from `Bundle.sizes`.
    """

    digest: str | None
    tensors: Mapping[str, Mapping[str, Array]]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Bank:
    """All resident adapters on the device.

    Args:
        residents: task -> adapter, `base` first.
        rows: task -> its row, in the order of the residents.
        values: graph input -> bank (T, ...) on the device.
        bindings: free IO bindings that have the banks bound; a run takes one and puts it back.
    """

    residents: Mapping[str, Resident]
    rows: Mapping[str, int]
    values: Mapping[str, onnxruntime.OrtValue]
    bindings: deque[onnxruntime.IOBinding] = field(default_factory=deque)

    def row(self, task: str) -> int:
        """The bank row of a task.

        Raises:
            UnknownTask: it is not resident.
        """
        row = self.rows.get(task)
        if row is not None:
            return row
        raise UnknownTask(
            f"run task {task!r}",
            expected=f"one of {', '.join(self.residents)}",
            got=repr(task),
            fix="Load it with Runtime.load, or add it to the bundle with 'tpeft-deploy adapter add'.",
        )


def make_resident(bundle: Bundle, adapter: Adapter | None, digest: str | None) -> Resident:
    """An adapter laid out for the bundle's graphs; None is the base.

    Raises:
        UnknownTarget, ShapeError, BaseMismatch: it does not fit the bundle.
    """
    tensors = bundle.fill(adapter) if adapter is not None else {}
    return Resident(digest, tensors, bundle.sizes(adapter))


def build(bundle: Bundle, residents: Mapping[str, Resident], device: str) -> Bank:
    """Stack adapters and place the banks on a device.

    Args:
        bundle: gives the targets and the base's own tensors.
        residents: task -> adapter; `base` must come first.
        device: "cpu" or "cuda".
    """
    if next(iter(residents)) != BASE_TASK:
        raise ValueError(f"the first row of a bank is {BASE_TASK!r}")
    values = {}
    for target in bundle.manifest.targets:
        key, default = target.key, bundle.default(target)
        for slot in slots.slots_of(target):
            rows = [resident.tensors.get(key, default)[slot.name] for resident in residents.values()]
            name = slots.input_name(target, slot.name)
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(slots.stack(rows)), device, 0)
    return Bank(dict(residents), {task: row for row, task in enumerate(residents)}, values)
