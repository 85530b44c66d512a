"""The numeric gate: no export leaves without having been compared with the merged torch model.

The reference is the base module itself, run with gain * (W + dW) (in float64) and the task's overrides in place of
its own tensors.  Relative error is ||export - reference|| / ||reference|| in the Frobenius norm, the worst over
outputs; limits are those of the project: 1e-5 in float32, 2e-3 in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.bases import Base, Inputs
from tpeft_deploy.tucker import Array

__all__ = [
    "ORT_ERRORS",
    "Check",
    "Outputs",
    "batches",
    "compare",
    "merged_tensors",
    "open_session",
    "reference",
    "relative_error",
    "run",
    "with_rows",
]

Outputs = dict[str, Array]
ORT_ERRORS = (ort_errors.Fail, ort_errors.RuntimeException, ort_errors.InvalidArgument)
ROWS = (2, 5)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        form: folded, factored, banked or base.
        task: the task it was made for, or "mixed".
        rows: batch size.
        error: relative error, the worst over outputs and rows.
        limit: what it had to stay under.
    """

    form: str
    task: str
    rows: int
    error: float
    limit: float

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)


def merged_tensors(base: Base, adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """The tensors that an adapter changes: gain * (W + dW) in float64 and rounded once, and the overrides."""
    if adapter is None:
        return {}
    weights = base.weights
    merged: dict[str, torch.Tensor] = {}
    for name in [*adapter.deltas, *(name for name in adapter.gains if name not in adapter.deltas)]:
        merged[name] = torch.from_numpy(adapter.merged(name, weights[name]).astype(weights[name].dtype))
    for name, array in adapter.served_overrides.items():
        merged[name] = torch.from_numpy(np.array(array, dtype=weights[name].dtype))
    return merged


def reference(base: Base, adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
    """What the merged torch model computes: output name -> array."""
    with base.evaluating() as module:
        outputs = functional_call(module, merged_tensors(base, adapter), (), dict(inputs), tie_weights=True)
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def batches(base: Base) -> list[Inputs]:
    """Inputs to check an export with: the example's batch size and another one, where the batch is dynamic."""
    return [with_rows(base, rows) for rows in ROWS] if base.batched else [base.inputs]


def with_rows(base: Base, rows: int) -> Inputs:
    """A base's example inputs with another batch size.

    Repeated rows are rolled along their last axis, so that all differ: equal rows would hide a wrong row order.
    """
    return {name: _with_rows(value, rows) if name in base.batched else value for name, value in base.inputs.items()}


def _with_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    own = value.shape[0]
    picked = [value[row % own] for row in range(rows)]
    return torch.stack([row.roll(i // own, -1) if row.ndim else row for i, row in enumerate(picked)])


def open_session(model: Path) -> onnxruntime.InferenceSession:
    """A CPU session that keeps to itself: no spinning threads, errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Inputs, extra: Mapping[str, Array]) -> Outputs:
    """Run a session on torch inputs and further arrays: output name -> array."""
    names = [output.name for output in session.get_outputs()]
    feeds = {name: value.numpy() for name, value in inputs.items()} | dict(extra)
    return dict(zip(names, session.run(names, feeds), strict=True))


def compare(form: str, task: str, got: Mapping[str, Array], expected: Mapping[str, Array]) -> Check:
    """Compare all outputs.

    Raises:
        NotEquivalent: a shape differs, or an error is above its limit.
    """
    worst, limit, rows = 0.0, 1e-5, 1
    for name, reference_array in expected.items():
        array = got[name]
        if array.shape != reference_array.shape:
            raise NotEquivalent(
                f"check the {form} export of task {task!r}, output {name!r}",
                expected=f"shape {reference_array.shape}",
                got=array.shape,
                fix="Nothing was written.",
            )
        limit = max(limit, 2e-3 if reference_array.dtype.itemsize == 2 else 1e-5)
        rows = array.shape[0] if array.ndim else 1
        worst = max(worst, relative_error(array, reference_array))
    if not worst <= limit:
        raise NotEquivalent(
            f"check the {form} export of task {task!r} with {rows} rows",
            expected=f"relative error <= {limit:g} against the merged torch model",
            got=f"{worst:.2e}",
            fix="Nothing was written; please report the model.",
        )
    return Check(form, task, rows, worst, limit)


def relative_error(got: Array, expected: Array) -> float:
    """||got - expected|| / ||expected||; the plain norm of the difference when the reference is zero."""
    difference = float(np.linalg.norm(got.astype(np.float64) - expected.astype(np.float64)))
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return difference / size if size else difference
