from __future__ import annotations

import pytest

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.devices.choices import choose_devices
from tpeft_deploy.runtime.sessions import providers
from tpeft_deploy.runtime.sessions.cuda_provider import CudaProvider
from tpeft_deploy.runtime.sessions.openvino_provider import OpenvinoProvider
from tpeft_deploy.runtime.sessions.tensorrt_provider import TensorrtProvider


def test_without_numbers_there_is_the_device_of_the_provider() -> None:
    assert choose_devices("cpu", None) == [providers.choose("cpu")]


def test_on_the_cpu_each_number_is_a_device() -> None:
    assert choose_devices("cpu", [0, 1, 5]) == 3 * [providers.choose("cpu")]


@pytest.mark.parametrize(("provider", "devices"), [("cpu", []), ("cpu", [1, 1]), ("cpu", [0, -1]), ("cuda:1", [0])])
def test_numbers_that_name_no_devices_are_refused_in_one_line(provider: str, devices: list[int]) -> None:
    with pytest.raises(ProviderUnavailable, match="each once") as refused:
        choose_devices(provider, devices)
    assert "\n" not in str(refused.value)


def test_a_provider_with_one_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenvinoProvider, "obstacle", lambda self: None)
    with pytest.raises(ProviderUnavailable, match=r"choose devices of OpenVINO: expected .*: cuda, cpu, tensorrt, got"):
        choose_devices("openvino", [0, 1])


def test_tensorrt_and_its_reference_have_the_device_of_each_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorrtProvider, "obstacle", lambda self: None)
    chosen = choose_devices("tensorrt", [0, 1])
    assert [(own.provider, own.device) for own in chosen] == [("tensorrt", "cuda"), ("tensorrt", "cuda:1")]
    assert [(own.reference.provider, own.reference.device) for own in chosen] == [("cuda", "cuda"), ("cuda", "cuda:1")]


def test_each_number_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(self: CudaProvider) -> str | None:
        return None if self.device_id < 2 else f"no tensor could be placed on device {self.device_id}"

    monkeypatch.setattr(CudaProvider, "obstacle", obstacle)
    assert [own.device for own in choose_devices("auto", [1, 0])] == ["cuda:1", "cuda"]
    with pytest.raises(ProviderUnavailable, match="expected a working CUDA device 2, got no tensor"):
        choose_devices("cuda", [0, 2])
