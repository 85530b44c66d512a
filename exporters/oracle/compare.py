"""The numeric gate: every export is compared with the merged model.

The reference is the base itself, run with gain * (W + dW) (in float64) and the task's overrides in place of the base's
tensors.  Relative error is ||export - reference|| / ||reference|| in the Frobenius norm, the worst over outputs;
limits are those of the project: 1e-5 in float32, and in 16 bits what `oracle.rounding` derives, or a fixed one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from tpeft_deploy.bundle.tolerances import LIMIT, LIMITS, WIDEST_TOLERANCE
from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.oracle import bfloat16
from tpeft_deploy.exporters.oracle.base import Inputs, Outputs
from tpeft_deploy.exporters.oracle.limits import ErrorLimits
from tpeft_deploy.exporters.oracle.subject import Sizes
from tpeft_deploy.tucker import Array

__all__ = [
    "EXACT",
    "MERGED",
    "ORT_ERRORS",
    "ROUNDED",
    "Check",
    "compare",
    "measure",
    "open_session",
    "relative_error",
    "run",
]

MERGED = "merged"
_SUGGESTED = 10  # times the limit: what rounding may explain
_QUANTISED = "MatMulNBits"
EXACT, ROUNDED = 1, 4
"""MatMulNBits' accuracy_level: 1 computes in float32, 4 rounds the activations of every block to 8 bits."""
_CPU = "CPUExecutionProvider"
_FIX = "It must not be served; please report the model."
_FIX_READING = (
    "The export is not what was trained: the training library computes something else with the same file; please "
    "report the adapter."
)
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
        form: base, folded, factored, banked, "mixed rows", or "padded".
        task: the task it was made for.
        sizes: the free sizes of the inputs, e.g. {"batch": 5, "sequence": 14}.
        error: relative error of the output that is nearest to its limit, or the furthest beyond; infinite where there
            is nothing to compare.
        limit: relative error allowed for that output.
        outputs: relative error of every output.
        failure: why the form may not be used, or None where every output is within the limit.
        oracle: reference of the comparison: the merged base, or a training library ("peft 0.21.2").
    """

    form: str
    task: str
    sizes: Sizes
    error: float
    limit: float
    outputs: Mapping[str, float]
    failure: NotEquivalent | None = None
    oracle: str = MERGED

    def to_json(self) -> dict[str, Any]:
        """Entry of a manifest, which holds no check that failed."""
        return {
            "form": self.form,
            "task": self.task,
            "sizes": dict(self.sizes),
            "error": self.error,
            "limit": self.limit,
            "outputs": dict(self.outputs),
            "oracle": self.oracle,
        }

    def passed(self) -> Check:
        """The check itself.

        Raises:
            NotEquivalent: it failed.
        """
        if self.failure is not None:
            raise self.failure
        return self


def open_session(file: Path, *, optimized: bool = True, served: bool = False) -> onnxruntime.InferenceSession:
    """A CPU session without spinning threads, log and packed copies of the weights.

    A model in bfloat16, which the CPU cannot run, is run as a copy in float32 with the same weights.  Quantised
    products compute in float32 too: their rounding of activations would hide what a proof looks for.

    Args:
        file: the ONNX file.
        optimized: whether ONNX Runtime may rewrite the graph; a reference is run as it is written.
        served: whether quantised products may round their activations to 8 bits, as a server lets them.

    Raises:
        NotEquivalent: ONNX Runtime refuses the graph.
    """
    model = onnx.load(file, load_external_data=False)
    found = _dtypes(model.graph)
    if onnx.TensorProto.BFLOAT16 not in found:
        content = None if served else _unrounded(model)
        return _open(file, optimized=optimized, half=onnx.TensorProto.FLOAT16 in found, content=content)
    with tempfile.TemporaryDirectory() as place:
        wide = ir.load(file)
        bfloat16.upcast(wide)
        ir.save(wide, Path(place) / "model.onnx", external_data="model.data")
        return _open(Path(place) / "model.onnx", optimized=optimized, half=False)


def _unrounded(model: onnx.ModelProto) -> bytes | None:
    """A model with quantised products that compute in float32; None where it is as it should be."""
    levels = [
        level
        for node in model.graph.node
        if node.op_type == _QUANTISED
        for level in node.attribute
        if level.name == "accuracy_level" and level.i == ROUNDED
    ]
    for level in levels:
        level.i = EXACT
    return model.SerializeToString() if levels else None


def _open(file: Path, *, optimized: bool, half: bool, content: bytes | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what fails is reported, with its reason, by us
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1")
    # A pass without 16-bit kernels to offer, in which ONNX Runtime 1.32 crashes on a transposed 16-bit product.
    disabled = ["NchwcTransformer"] if half else []
    try:
        return onnxruntime.InferenceSession(
            content or str(file), options, providers=[_CPU], disabled_optimizers=disabled
        )
    except ORT_ERRORS as error:
        reason = str(error).splitlines()[0][:300]
        raise NotEquivalent(f"open {file}", problem=f"ONNX Runtime refuses the graph ({reason})", fix=_FIX) from error


def _dtypes(graph: onnx.GraphProto) -> set[int]:
    """The dtypes of a graph's weights, and those that it casts to: all weights may be inputs."""
    casts = {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
    return {tensor.data_type for tensor in graph.initializer} | casts


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


def compare(
    form: str,
    task: str,
    sizes: Sizes,
    got: Mapping[str, Array],
    expected: Mapping[str, Array],
    limit: ErrorLimits = LIMIT,
) -> Check:
    """Compare all outputs; the arguments are those of `measure`.

    Raises:
        NotEquivalent: a shape differs, or an error is above its limit.
    """
    return measure(form, task, sizes, lambda: got, expected, limit).passed()


def measure(
    form: str,
    task: str,
    sizes: Sizes,
    answer: Callable[[], Mapping[str, Array]],
    expected: Mapping[str, Array],
    limit: ErrorLimits = LIMIT,
    oracle: str = MERGED,
) -> Check:
    """Compare all outputs of a run; a failure is part of the result, not raised.

    Args:
        form: form that was run, as in `Check`.
        task: the task that was run.
        sizes: free sizes of the inputs.
        answer: runs the form.
        expected: the reference's outputs.
        limit: relative error allowed for all outputs, or for each; at least 2e-3 where an output is in 16 bits.
        oracle: source of `expected`, as in `Check`.
    """
    against, fix = ("the merged model", _FIX) if oracle == MERGED else (f"the forward of {oracle}", _FIX_READING)
    doing = f"check the {form} export of task {task!r} at " + ", ".join(f"{n} {size}" for n, size in sizes.items())
    try:
        got = answer()
    except NotEquivalent as error:
        nothing = dict.fromkeys(expected, math.inf)
        return Check(form, task, sizes, math.inf, max(_limits(limit, expected).values()), nothing, error, oracle)
    limits = _limits(limit, {name: got.get(name, reference) for name, reference in expected.items()})
    errors, failure = {}, None
    for name, reference in expected.items():
        shape = got[name].shape if name in got else None
        if shape == reference.shape:
            errors[name] = relative_error(got[name], reference)
            continue
        errors[name] = math.inf
        failure = failure or NotEquivalent(
            f"{doing}, output {name!r}",
            expected=f"shape {reference.shape}",
            got=shape or "no such output",
            fix=_FIX,
        )
    # NaN is the worst of all, and must not pass.
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / limits[name])
    if failure is None and not errors[worst] <= limits[worst]:
        failure = NotEquivalent(
            doing,
            expected=f"relative error <= {limits[worst]:g} against {against}",
            got=f"{errors[worst]:.2e} in output {worst!r}",
            fix=_tolerable(form, errors[worst], limits[worst]) or fix,
        )
    return Check(form, task, sizes, errors[worst], limits[worst], errors, failure, oracle)


def _tolerable(form: str, error: float, limit: float) -> str | None:
    """Advice where the base without any branch is a little off: the rounding of its operators in ONNX Runtime."""
    accepted = float(f"{1.5 * error:.0e}")
    if form != "base" or not error <= _SUGGESTED * limit or accepted > WIDEST_TOLERANCE:
        return None
    return (
        "The base itself, without any adapter, differs by this much in ONNX Runtime. If that is good enough, accept "
        f"it: tolerance={accepted:g} (--tolerance {accepted:g} on the command line)."
    )


def _limits(limit: ErrorLimits, outputs: Mapping[str, Array]) -> dict[str, float]:
    least = LIMITS["float16"] if any(array.dtype.itemsize == 2 for array in outputs.values()) else 0.0
    return {name: max(limit if isinstance(limit, float) else limit[name], least) for name in outputs}


def relative_error(got: Array, expected: Array) -> float:
    """||got - expected|| / ||expected||; the plain norm of the difference when the reference is zero."""
    difference = float(np.linalg.norm(got.astype(np.float64) - expected.astype(np.float64)))
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return difference / size if size else difference
