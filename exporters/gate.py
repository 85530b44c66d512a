"""The numeric gate: no export leaves without having been compared with the merged model.

The reference is the base itself, run with gain * (W + dW) (in float64) and the task's overrides in place of its own
tensors.  Relative error is ||export - reference|| / ||reference|| in the Frobenius norm, the worst over outputs;
limits are those of the project: 1e-5 in float32, 2e-3 in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.bases import Inputs, Outputs
from tpeft_deploy.exporters.samples import Sizes
from tpeft_deploy.tucker import Array

__all__ = ["ORT_ERRORS", "Check", "compare", "open_session", "relative_error", "run"]

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.RuntimeException,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        form: base, folded, factored, banked, or "mixed rows".
        task: the task it was made for.
        sizes: the free sizes of the inputs, e.g. {"batch": 5, "sequence": 14}.
        error: relative error, the worst over outputs.
        limit: what it had to stay under.
        outputs: relative error of every output.
    """

    form: str
    task: str
    sizes: Sizes
    error: float
    limit: float
    outputs: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)


def open_session(model: Path, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    """A CPU session that keeps to itself: no spinning threads, errors only, and no packed copies of the weights.

    Args:
        model: the file.
        optimized: whether ONNX Runtime may rewrite the graph.
    """
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Inputs, extra: Mapping[str, Array]) -> Outputs:
    """Run a session: output name -> array.

    Raises:
        NotEquivalent: the graph does not run on these inputs, which the model itself takes.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs) | dict(extra)), strict=True))
    except ORT_ERRORS as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise NotEquivalent(
            f"run the exported graph on inputs {shapes}",
            problem=f"it fails where the model itself does not ({str(error).splitlines()[0][:300]})",
            fix="A graph is frozen at sizes that were 1 while it was traced: give larger example inputs, so that every "
            "dynamic axis is at least 2 at every stage.",
        ) from error


def compare(form: str, task: str, sizes: Sizes, got: Mapping[str, Array], expected: Mapping[str, Array]) -> Check:
    """Compare all outputs.

    Raises:
        NotEquivalent: a shape differs, or an error is above its limit.
    """
    errors, limit = {}, 1e-5
    at = ", ".join(f"{name} {size}" for name, size in sizes.items())
    for name, reference in expected.items():
        if got[name].shape != reference.shape:
            raise NotEquivalent(
                f"check the {form} export of task {task!r} at {at}, output {name!r}",
                expected=f"shape {reference.shape}",
                got=got[name].shape,
                fix="Nothing was written.",
            )
        limit = max(limit, 2e-3 if got[name].dtype.itemsize == 2 else 1e-5)
        errors[name] = relative_error(got[name], reference)
    worst = max(errors.values())
    # Not worst > limit: NaN must not pass.
    if not all(error <= limit for error in errors.values()):
        raise NotEquivalent(
            f"check the {form} export of task {task!r} at {at}",
            expected=f"relative error <= {limit:g} against the merged model",
            got=f"{worst:.2e} in output {max(errors, key=lambda name: errors[name])!r}",
            fix="Nothing was written; please report the model.",
        )
    return Check(form, task, sizes, worst, limit, errors)


def relative_error(got: Array, expected: Array) -> float:
    """||got - expected|| / ||expected||; the plain norm of the difference when the reference is zero."""
    difference = float(np.linalg.norm(got.astype(np.float64) - expected.astype(np.float64)))
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return difference / size if size else difference
