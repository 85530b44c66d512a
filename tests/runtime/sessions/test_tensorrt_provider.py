"""TensorRT's options and refusals; what it computes was not run, for want of a machine with TensorRT."""

from __future__ import annotations

import ctypes

import numpy as np
import onnxruntime
import pytest

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.sessions import providers
from tpeft_deploy.runtime.sessions.cuda_provider import CudaProvider
from tpeft_deploy.runtime.sessions.execution_provider import CPU, Cuda
from tpeft_deploy.runtime.sessions.tensorrt_provider import TensorrtProvider

TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"


def pretend(monkeypatch: pytest.MonkeyPatch, *, library: bool) -> list[str]:
    """A GPU with or without TensorRT; returns the libraries that were asked for."""
    asked: list[str] = []

    def load(name: str, mode: int = 0) -> object:
        asked.append(name)
        if not library:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    def place(array: np.ndarray, device: str, number: int) -> None:
        assert (device, number) in {("cuda", 0), ("cuda", 1)}

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **where: None)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", place)
    monkeypatch.setattr(CudaProvider, "_tf32_in_use", False)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return asked


def test_tensorrt_computes_exactly_with_cuda_below_it() -> None:
    cuda = Cuda(memory_bytes=2**30)
    (name, options), below, last = TensorrtProvider().on(1).chain(cuda, None)
    assert name == TENSORRT
    assert {key: value for key, value in options.items() if value != "0"} == {
        "device_id": "1",
        "trt_max_workspace_size": "1073741824",
    }
    assert {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_engine_cache_enable"} <= set(options)
    assert below == (CUDA, cuda.options() | {"device_id": "1"})
    assert last == (CPU, {})


def test_tensorrt_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, library=True)
    choice = providers.choose("tensorrt:1")
    assert (choice.device, choice.reference) == ("cuda:1", providers.Choice("cuda", choice.reason, 1))
    assert choice.reason == "libnvinfer.so.10 was loaded and a tensor was placed on device 1"
    assert asked == ["libnvinfer.so.10"]
    assert providers.choose("auto").provider == "cuda"


def test_tensorrt_is_refused_by_name_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, library=False)
    with pytest.raises(ProviderUnavailable, match=r"use the TensorRT provider: .*got libnvinfer.so.10: cannot open"):
        providers.choose("tensorrt")


def test_tensorrt_is_refused_by_name_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderUnavailable, match=r"this onnxruntime was built without TensorRT. Install"):
        providers.choose("tensorrt")
