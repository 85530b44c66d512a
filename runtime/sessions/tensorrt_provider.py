"""ONNX Runtime's TensorRT execution provider."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import onnxruntime

from tpeft_deploy.runtime.sessions.cuda_provider import CudaProvider
from tpeft_deploy.runtime.sessions.execution_provider import Cuda

__all__ = ["TensorrtProvider"]

_LIBRARY = "libnvinfer.so.10"  # what the TensorRT provider of onnxruntime-gpu is linked with


class TensorrtProvider(CudaProvider):
    """An NVIDIA GPU, with the base and folded sessions compiled by TensorRT."""

    label = "TensorRT"
    session_provider = "TensorrtExecutionProvider"
    graphs = False
    generates = False
    automatic = False
    compiles = True
    banks = False
    reference = "cuda"
    fix = "Install 'tpeft-deploy[gpu]' and TensorRT 10 on a machine with an NVIDIA driver, or use 'cuda'."

    @property
    def reason(self) -> str:  # type: ignore[override]
        """Why TensorRT is chosen."""
        return f"{_LIBRARY} was loaded and {super().reason}"

    def obstacle(self) -> str | None:
        """Load TensorRT and place a tensor on the device; return why that is impossible, or None."""
        if self.session_provider not in onnxruntime.get_available_providers():
            return "this onnxruntime was built without TensorRT"
        return super().obstacle() or _load()

    def options(self, cuda: Cuda) -> dict[str, str]:
        """Return the provider options for ONNX Runtime: exact arithmetic, and no files written."""
        options = {
            "device_id": str(self.device_id),
            "trt_fp16_enable": "0",
            "trt_bf16_enable": "0",
            "trt_int8_enable": "0",
            # Engines are built for one GPU and one TensorRT; whoever can write a cached one runs code here.
            "trt_engine_cache_enable": "0",
            "trt_timing_cache_enable": "0",
        }
        if cuda.memory_bytes is not None:
            options["trt_max_workspace_size"] = str(cuda.memory_bytes)
        return options

    def chain(self, cuda: Cuda, threads: int | None) -> list[tuple[str, dict[str, str]]]:
        """Return the providers of a session; TensorRT allocates through CUDA's."""
        own, *others = super().chain(cuda, threads)
        return [own, (CudaProvider.session_provider, super().options(cuda)), *others]


def _load() -> str | None:
    """Load TensorRT, from the `tensorrt` packages wherever they are installed; return why that is impossible."""
    found = importlib.util.find_spec("tensorrt_libs")
    places = [str(Path(place) / _LIBRARY) for place in (found.submodule_search_locations if found else None) or ()]
    for library in (*places, _LIBRARY):
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            obstacle = str(error).strip()[:160]
        else:
            return None
    return obstacle
