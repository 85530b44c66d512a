from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.fusions import residual_norm
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.folding import compare
from tpeft_deploy.runtime.sessions import execution_provider, providers
from tpeft_deploy.runtime.sessions.cpu_provider import CpuProvider
from tpeft_deploy.runtime.sessions.cuda_provider import CudaProvider


def cuda_works() -> bool:
    return providers.choose("auto").device == "cuda"


def test_auto_says_what_it_chose(conv_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpeft_deploy.runtime"):
        runtime = Runtime(conv_bundle.path, provider="auto")
    assert runtime.provider_reason
    if runtime.provider == "cpu":
        assert caplog.messages == [f"provider auto: the CPU, as {runtime.provider_reason}"]


def test_unknown_providers_are_refused(conv_bundle: Bundle) -> None:
    with pytest.raises(ProviderUnavailable, match=r"one of auto, cuda, cpu, openvino, tensorrt, or .*, got 'tpu'"):
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
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **where: None)
    with pytest.raises(ProviderUnavailable, match="no tensor could be placed on device 0"):
        providers.choose("cuda")


def test_two_runtimes_in_one_environment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_provider, "_owns", lambda distribution, file: True)
    with pytest.raises(
        ProviderUnavailable, match="several of onnxruntime, onnxruntime-gpu, onnxruntime-openvino are installed"
    ):
        providers.choose("cuda")


def test_the_cpu_is_served_from_a_mixed_installation_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution_provider, "_owns", lambda distribution, file: True)
    assert providers.choose("cpu").device == "cpu"
    assert "several of" in caplog.messages[0]


def test_the_cpu_keeps_residual_sums_and_norms_apart(tmp_path: Path) -> None:
    """ONNX Runtime's fused kernel takes several times as long there."""
    file, written = tmp_path / "model.onnx", tmp_path / "optimised.onnx"
    file.write_bytes(residual_norm(384))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(written)
    providers.open_session(file, providers.choose("cpu"), options=options)
    assert [node.op_type for node in onnx.load(written).graph.node] == ["Add", "LayerNormalization"]


def pretend_two_devices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The devices on which a tensor was placed, or not."""
    placed: list[tuple[str, int]] = []

    def place(array: np.ndarray, device: str, number: int) -> None:
        placed.append((device, number))
        if number > 1:
            raise RuntimeError("no such GPU")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **where: None)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", place)
    monkeypatch.setattr(CudaProvider, "_tf32_in_use", False)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    return placed


def test_a_process_settles_tf32_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's libraries read the variable when they are loaded."""
    pretend_two_devices(monkeypatch)
    with pytest.raises(ProviderUnavailable):
        providers.choose("cuda:2", allow_tf32=True)  # settles nothing
    for _ in range(2):
        providers.choose("cuda", allow_tf32=True)
        assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    with pytest.raises(ProviderUnavailable, match="with TF32 ruled out: expected a process in which it is not allowed"):
        providers.choose("auto")
    monkeypatch.setattr(CudaProvider, "_tf32_in_use", False)
    for _ in range(2):
        providers.choose("cuda")
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    with pytest.raises(ProviderUnavailable, match="with TF32 allowed: expected a process in which it is not ruled out"):
        providers.choose("auto", allow_tf32=True)
    assert providers.choose("cpu", allow_tf32=True).device == "cpu"


@pytest.mark.parametrize(
    "provider", ["cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cpu:0", "auto:1", ":1", "openvino:1", "tensorrt:"]
)
def test_what_is_no_numbered_device_is_refused(provider: str) -> None:
    with pytest.raises(ProviderUnavailable, match=f"or a numbered device as cuda:1, tensorrt:1, got '{provider}'"):
        providers.choose(provider)


def test_a_numbered_device_is_used_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = pretend_two_devices(monkeypatch)
    choice = providers.choose("cuda:1")
    assert (choice.device, choice.reason) == ("cuda:1", "a tensor was placed on device 1")
    assert device_lock.place(choice.device) == ("cuda", 1)
    assert choice.execution.options(providers.DEFAULT_CUDA)["device_id"] == "1"
    assert providers.choose("cuda").device == "cuda"
    with pytest.raises(ProviderUnavailable, match=r"working CUDA device 2, got .* on device 2 \(no such GPU\)"):
        providers.choose("cuda:2")
    assert placed == [("cuda", 1), ("cuda", 0), ("cuda", 2)]


def test_what_cuda_is_asked_for() -> None:
    always = {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert providers.Cuda().options() == always
    asked = providers.Cuda(memory_bytes=2**30, graphs=True).options()
    assert providers.Cuda(tf32=True).options() == always | {"use_tf32": "1"}
    assert asked == always | {"gpu_mem_limit": "1073741824", "enable_cuda_graph": "1"}


def test_a_further_provider_is_one_class(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(CpuProvider):
        label = "the other"
        prepacks = False

        def options(self, cuda: providers.Cuda) -> dict[str, str]:
            asked.append(cuda)
            return {}

    asked: list[providers.Cuda] = []
    monkeypatch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "other": Other()})
    with Runtime(conv_bundle.path, provider="other", session_bytes=2**30) as runtime:
        assert runtime.provider == "other"
        assert runtime.run(Bundle.open(conv_bundle.path).example(), "two")
    assert asked[0] == providers.Cuda(memory_bytes=2**30)


class Compiling(CpuProvider):
    """The CPU, as a provider that compiles graphs."""

    label = "the compiler"
    compiles = True
    prepacks = False
    reference = "cpu"


def pretend(monkeypatch: pytest.MonkeyPatch, provider: CpuProvider) -> providers.Choice:
    monkeypatch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "compiler": provider})
    return providers.Choice("compiler", "a test says so")


def test_graphs_that_take_factors_are_refused_by_providers_that_compile(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = pretend(monkeypatch, Compiling())
    with pytest.raises(
        ProviderUnavailable, match=r"a graph whose inputs are all fed, got [0-9]+ factors, which it comp"
    ):
        providers.open_session(conv_bundle.path / "factored.onnx", choice)
    assert providers.open_session(conv_bundle.path / "base.onnx", choice)


def test_small_weights_are_handed_to_providers_that_compile(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime leaves them in weights.data, and OpenVINO looks for that in the working directory at times."""
    session = providers.open_session(conv_bundle.path / "base.onnx", pretend(monkeypatch, Compiling()))
    small = {name: weight for name, weight in conv_bundle.manifest.weights.items() if 0 < weight.length <= 127}
    assert small
    for name in small:
        assert np.array_equal(session.initializers[name].numpy(), conv_bundle.base_value(name))


def test_nodes_on_another_provider_are_refused_by_name(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = pretend(monkeypatch, Compiling())
    nodes = [("OtherProvider", "Scan", "a"), (CpuProvider.session_provider, "Add", "b"), ("OtherProvider", "Mod", "c")]
    monkeypatch.setattr(providers, "_assigned", lambda session: iter(nodes))
    with pytest.raises(
        ProviderUnavailable, match=r"open base.onnx on the compiler: .* some .*: 1 Mod, 1 Scan. Use 'cpu'"
    ):
        providers.open_session(conv_bundle.path / "base.onnx", choice)


def test_what_a_compiler_lacks_is_said_in_one_line(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "[E] : in basic_backend.cc\nException from core.cpp:1:\nUnsupported Convolution\nDetails:\n\nDynamic weights\nx"
    )

    def refuse(*_: object, **__: object) -> object:
        raise RuntimeError(text)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ProviderUnavailable, match=r"compiles, got Unsupported Convolution; Dynamic weights. Use"):
        providers.open_session(conv_bundle.path / "base.onnx", pretend(monkeypatch, Compiling()))


def test_only_folded_tasks_are_served_where_the_bank_is_refused(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Folding(Compiling):
        banks = False

    pretend(monkeypatch, Folding())
    inputs = Bundle.open(conv_bundle.path).example()
    with Runtime(conv_bundle.path, provider="cpu") as runtime:
        expected = {task: runtime.run(inputs, task) for task in ("base", "two")}
    with Runtime(conv_bundle.path, provider="compiler") as runtime:
        assert runtime.only_folded
        assert runtime.provider_reason.endswith(
            "banked.onnx not used (the compiler compiles base and folded graphs only)"
        )
        assert compare.agree(runtime.run(inputs), expected["base"]) < 1e-5
        with pytest.raises(ProviderUnavailable, match="run task 'two' of bundle 'conv': expected a task with a folded"):
            runtime.run(inputs, "two")
        runtime.pin("two", folded=True)
        assert compare.agree(runtime.run(inputs, "two"), expected["two"]) < 1e-5
        rows = len(next(iter(inputs.values())))
        mixed = runtime.run(inputs, tasks=["two", *["base"] * (rows - 1)])
        assert len(mixed) == len(expected["two"])


def test_only_folded_tasks_are_served_on_each_of_several_devices(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Folding(Compiling):
        banks = False

    pretend(monkeypatch, Folding())
    inputs = conv_bundle.example()
    with Runtime(conv_bundle.path, provider="compiler", devices=[0, 1], preload=False) as runtime:
        replicas = runtime._only.replicas  # type: ignore[union-attr]
        assert all(own.only_folded and own.folds.has(runtime._versions.base) for own in replicas)
        runtime.pin("two", folded=True)
        found = [own.engine.run_one(inputs, own.own([runtime._versions.find("two")])[0]) for own in replicas]
        assert compare.agree(*found) < 1e-5


@pytest.mark.parametrize("devices", [None, [0, 1]])
def test_a_provider_that_answers_differently_is_refused(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, devices: list[int] | None
) -> None:
    pretend(monkeypatch, Compiling())
    found: list[float] = [] if devices is None else [0.0, 0.0]  # of the base and a task on the first device

    def agree(*_: object) -> float:
        return found.pop() if found else np.inf

    monkeypatch.setattr(compare, "agree", agree)
    with pytest.raises(
        ProviderUnavailable, match="open bundle 'conv' on the compiler: expected the example's answer for 'base' with"
    ):
        Runtime(conv_bundle.path, provider="compiler", devices=devices)
    assert not found


@pytest.mark.parametrize("banks", [True, False])
def test_a_base_that_cannot_be_opened_is_refused(
    conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, banks: bool
) -> None:
    class Refusing(Compiling):
        def graph(self, model: bytes) -> bytes:
            raise ProviderUnavailable("open a graph", problem="it cannot")

    provider = Refusing()
    provider.banks = banks
    pretend(monkeypatch, provider)
    with pytest.raises(ProviderUnavailable, match="open bundle 'conv' on the compiler: open a graph: it cannot"):
        Runtime(conv_bundle.path, provider="compiler")
