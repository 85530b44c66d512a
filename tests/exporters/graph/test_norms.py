"""Root mean square norms: fused by ONNX Runtime in every form, and only where that is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter, Runtime, export_bundle

FUSED = "SimplifiedLayerNormalization"


class Norm(nn.Module):
    """The norm of Llama, or of Gemma with a scale of 1 + weight."""

    def __init__(self, offset: float, epsilon: float = 0.1) -> None:
        super().__init__()
        self.offset, self.epsilon = offset, epsilon
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (self.offset + self.weight) * normed if self.offset else self.weight * normed


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.norm(x))
        return y


class Bare(nn.Module):
    """Norms that ONNX Runtime must not fuse: without a scale, or used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
        return normed + 2 * normed * torch.ones(8)


class Cubic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(8.0) * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 0.1))


def operators(file: Path, place: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(place / "optimized.onnx"), 4
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]


@pytest.mark.parametrize("norm", [Norm(0.0), Norm(1.0), nn.RMSNorm(8, eps=0.1)], ids=["llama", "gemma", "torch"])
def test_norms_are_fused_in_every_form(tmp_path: Path, norm: nn.Module) -> None:
    module = Net(norm).eval()
    adapters = {"a": nets.adapter_for(module, {"linear.weight": (2, 2)}, seed=1)}
    inputs = {"x": torch.randn(2, 3, 8)}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, folded=True)
    for file in bundle.path.rglob("*.onnx"):
        found = operators(file, tmp_path)
        assert FUSED in found, (file.name, found)
        assert "ReduceMean" not in found, (file.name, found)


@pytest.mark.parametrize("norm", [Bare(), Cubic(), Norm(0.0).double()], ids=["no scale", "cubic", "float64"])
def test_norms_that_would_be_fused_wrongly_are_not(tmp_path: Path, norm: nn.Module) -> None:
    module = Net(norm).to(torch.float64 if isinstance(norm, Norm) else torch.float32).eval()
    dtype = module.linear.weight.dtype
    bundle = export_bundle(module, {}, tmp_path / "bundle", example_inputs={"x": torch.randn(2, 3, 8, dtype=dtype)})
    assert FUSED not in operators(bundle.path / "base.onnx", tmp_path)


def test_a_task_replaces_the_scale_of_a_norm(tmp_path: Path) -> None:
    norm = Norm(0.0)
    module = Net(norm).eval()
    scale = np.linspace(-1, 1, 8, dtype=np.float32)
    adapters = {"a": Adapter(deltas={}, overrides={"norm.weight": scale}, source="a")}
    x = torch.randn(2, 3, 8)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs={"x": x})
    assert FUSED in operators(bundle.path / "factored.onnx", tmp_path)
    with torch.no_grad():
        base = module(x).numpy()
        norm.weight.copy_(torch.from_numpy(scale))
        changed = module(x).numpy()
    with Runtime(bundle.path) as runtime:
        mixed = runtime.run({"x": x.numpy()}, tasks=["a", "base"])["output"]
    np.testing.assert_allclose(mixed, np.stack([changed[0], base[1]]), rtol=1e-5, atol=1e-6)
