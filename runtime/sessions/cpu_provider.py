"""ONNX Runtime's CPU execution provider."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from tpeft_deploy.runtime.sessions.execution_provider import CPU, Cuda, ExecutionProvider

__all__ = ["CpuProvider"]


class CpuProvider(ExecutionProvider):
    """The CPU, which every build of ONNX Runtime has."""

    label = "the CPU"
    session_provider = CPU
    device: Literal["cpu"] = "cpu"
    no_dtypes = MappingProxyType({"bfloat16": "CUDA: ONNX Runtime's CPU cannot compute in bfloat16"})
    # The fused kernel takes 1.6 to 7 times as long as Add and LayerNormalization: benchmarks/fusions.py.
    slow_passes = ("SkipLayerNormFusion",)
    prepacks = True
    divided = True
    reason = "the CPU was asked for"

    def chain(self, cuda: Cuda, threads: int | None) -> list[tuple[str, dict[str, str]]]:
        """Return the provider alone."""
        return [(self.session_provider, self.options(cuda))]

    def obstacle(self) -> None:
        """Return None: the CPU can always be used."""
