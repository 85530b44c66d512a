"""Changes that are products with the base weight: library's file -> one bundle -> every form, against its forward."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from torch import Tensor, nn

from tests.helpers.formats.pefts import peft_model, save
from tests.helpers.formats.trained import lycoris_file, randomise
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import BaseMismatch

LIMIT = 1e-5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(4, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.point(pixels)))).mean((2, 3))
        out: Tensor = self.head(torch.tanh(self.fc(x)))
        return out


CONFIGS = {
    "oft": peft.OFTConfig(oft_block_size=2, target_modules=["point", "fc", "head"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["point", "conv", "fc", "head"]),
    "hra": peft.HRAConfig(r=2, target_modules=["point", "conv", "fc", "head"]),
    "hira": peft.HiraConfig(r=2, target_modules=["point", "conv", "fc", "head"]),
    "road": peft.RoadConfig(variant="road_2", group_size=4, target_modules=["fc", "head"]),
    "glora": peft.GloraConfig(r=2, target_modules=["fc", "head"]),
    "deft": peft.DeftConfig(r=2, target_modules=["fc", "head"]),
    "osf": peft.OSFConfig(effective_rank=3, target_modules=["fc", "head"]),
    "frod": peft.FrodConfig(sparse_rate=0.1, progressbar=False, target_modules=["fc", "head"]),
    "miss": peft.MissConfig(r=4, init_weights="bat", target_modules=["fc", "head"]),
    "peanut": peft.PeanutConfig(r=2, depth=1, target_modules=["fc", "head"]),
}
LYCORIS = {"diag-oft": DiagOFTModule, "lycoris-boft": ButterflyOFTModule}
METHODS = [*CONFIGS, *LYCORIS]


class Exported(NamedTuple):
    bundle: Bundle
    adapters: dict[str, Adapter]
    pixels: Tensor
    expected: dict[str, np.ndarray]


def lycoris_model(base: nn.Module, kind: Any, path: Path) -> tuple[nn.Module, Path]:
    model = copy.deepcopy(base)
    layers = {"lycoris_point": model.point, "lycoris_conv": model.conv, "lycoris_head": model.head}
    wrappers = {name: kind(name, layer, lora_dim=2, rescaled=True) for name, layer in layers.items()}
    for seed, wrapper in enumerate(wrappers.values()):
        wrapper.eval().apply_to()
        randomise(wrapper, seed)
    return model, lycoris_file(path / "adapter.safetensors", wrappers)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("products")
    torch.manual_seed(0)
    base = Net().eval()
    pixels = torch.randn(3, 4, 6, 5)
    expected, adapters = {}, {}
    for method in METHODS:
        if method in CONFIGS:
            model = peft_model(base, CONFIGS[method])
            file = save(model, path / method)
        else:
            model, file = lycoris_model(base, LYCORIS[method], path / method)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected[method] = model(pixels).numpy()
        adapters[method] = load_adapter(file, base=base)
    bundle = export_bundle(base, adapters, path / "bundle", example_inputs={"pixels": pixels}, folded=True)
    return Exported(bundle, adapters, pixels, expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_form_equals_the_library(exported: Exported, method: str) -> None:
    bundle, _, pixels, expected = exported
    inputs = {"pixels": pixels.numpy()}
    (folded,) = session(bundle, f"folded/{method}").run(None, inputs)
    (factored,) = session(bundle, "factored").run(None, inputs | bundle.factors(method))
    (base,) = session(bundle, "base").run(None, inputs)
    runtime = Runtime(bundle.path, provider="cpu")
    (banked,) = runtime.run(inputs, tasks=[method, "base", method]).values()
    assert isinstance(banked, np.ndarray)
    assert error(base, expected[method]) > 1e-2
    assert error(folded, expected[method]) <= LIMIT
    assert error(factored, expected[method]) <= LIMIT
    assert error(banked[::2], expected[method][::2]) <= LIMIT
    assert error(banked[1], base[1]) <= LIMIT


@pytest.mark.parametrize("method", METHODS)
def test_another_base_is_refused(exported: Exported, method: str) -> None:
    torch.manual_seed(9)
    other = {name: weight_digest(tensor.numpy()) for name, tensor in Net().state_dict().items()}
    with pytest.raises(BaseMismatch, match="trained on another base"):
        exported.adapters[method].check_digests(other, base="another")


def session(bundle: Bundle, name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(bundle.path / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
