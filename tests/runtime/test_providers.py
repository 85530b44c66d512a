from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime
import pytest

from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime import providers


def cuda_works() -> bool:
    return providers.choose("auto").device == "cuda"


def test_auto_says_what_it_chose(conv_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpeft_deploy.runtime"):
        runtime = Runtime(conv_bundle.path, provider="auto")
    assert runtime.provider_reason
    if runtime.provider == "cpu":
        assert caplog.messages == [f"provider auto: the CPU, as {runtime.provider_reason}"]


def test_unknown_providers_are_refused(conv_bundle: Bundle) -> None:
    with pytest.raises(ProviderUnavailable, match="one of auto, cuda, cpu, got 'tpu'"):
        Runtime(conv_bundle.path, provider="tpu")


@pytest.mark.skipif(cuda_works(), reason="CUDA works here, so asking for it is no error")
def test_cuda_is_refused_where_it_is_not(conv_bundle: Bundle) -> None:
    with pytest.raises(ProviderUnavailable, match=r"expected a working CUDA device, got .*Install"):
        Runtime(conv_bundle.path, provider="cuda")


def test_a_session_that_fell_back_to_the_cpu_is_refused(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime does when a CUDA library is missing: a session on the CPU, and no exception."""
    real = onnxruntime.InferenceSession

    def fallen(path: str, options: onnxruntime.SessionOptions, providers: list[object], **_: object) -> object:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen)
    choice = providers.Choice("cuda", "a test says so")
    with pytest.raises(ProviderUnavailable, match="expected a session on CUDAExecutionProvider, got one on CPU"):
        providers.open_session(Path(conv_bundle.path / "banked.onnx"), choice)


def test_a_listed_provider_without_a_device_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU package lists CUDA on machines that have none."""
    if cuda_works():
        pytest.skip("CUDA works here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(ProviderUnavailable, match="no tensor could be placed on device 0"):
        providers.choose("cuda")


def test_two_runtimes_in_one_environment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_installed", lambda name: True)
    with pytest.raises(ProviderUnavailable, match="both installed"):
        providers.choose("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_works(), reason="needs a CUDA device and onnxruntime-gpu")
def test_cuda_gives_the_answers_of_the_cpu(conv_bundle: Bundle) -> None:
    import numpy as np

    tasks = ["wide", "base", "two", "plain", "partial", "two"]
    inputs = {"pixels": np.random.default_rng(0).standard_normal((6, 1, 12, 14)).astype(np.float32)}
    answers = [Runtime(conv_bundle.path, provider=p).run(inputs, tasks=tasks)["logits"] for p in ("cuda", "cpu")]
    for got, expected in zip(*answers, strict=True):
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
