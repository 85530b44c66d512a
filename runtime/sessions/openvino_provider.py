"""ONNX Runtime's OpenVINO execution provider, on Intel and AMD CPUs."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Literal

import onnxruntime

from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.runtime.sessions.execution_provider import MIXED, Cuda, ExecutionProvider, mixed_installation

__all__ = ["OpenvinoProvider"]

# By itself OpenVINO computes in bfloat16 where the processor can, unless ONNX Runtime says otherwise.
_EXACT = {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}}


class OpenvinoProvider(ExecutionProvider):
    """The CPU, with graphs compiled by OpenVINO."""

    label = "OpenVINO"
    session_provider = "OpenVINOExecutionProvider"
    device: Literal["cpu"] = "cpu"
    no_dtypes = MappingProxyType({"bfloat16": "CUDA: OpenVINO does not take graphs in bfloat16"})
    generates = False
    automatic = False
    compiles = True
    reference = "cpu"
    reason = "OpenVINO was asked for"
    fix = "Install 'tpeft-deploy[openvino]' alone (not [cpu] or [gpu]), or use 'cpu'."

    def obstacle(self) -> str | None:
        """Return why OpenVINO cannot be used, or None."""
        if mixed_installation():
            return MIXED
        if self.session_provider not in onnxruntime.get_available_providers():
            return "this onnxruntime was built without OpenVINO"
        return None

    def options(self, cuda: Cuda) -> dict[str, str]:
        """Return the provider options for ONNX Runtime: exact arithmetic on the CPU."""
        return {"device_type": "CPU", "load_config": json.dumps(_EXACT)}

    def chain(self, cuda: Cuda, threads: int | None) -> list[tuple[str, dict[str, str]]]:
        """Return the providers of a session; OpenVINO does not use ONNX Runtime's threads."""
        (own, options), *others = super().chain(cuda, threads)
        return [(own, options if threads is None else options | {"num_of_threads": str(threads)}), *others]

    def graph(self, model: bytes) -> bytes:
        """Return an ONNX file without IsNaN, which attention has; the provider does not take it."""
        return onnx_bytes.without_is_nan(model)
