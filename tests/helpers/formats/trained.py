"""Adapters built, randomised, saved and run by the libraries that train them, against what is read from their files."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.formats import load_adapter


@dataclass(frozen=True)
class Kind:
    """A layer and the shape of one input row."""

    layer: type[nn.Module]
    arguments: Mapping[str, Any]
    row: tuple[int, ...]

    def build(self) -> nn.Module:
        return self.layer(**self.arguments)


KINDS = {
    "linear": Kind(nn.Linear, {"in_features": 12, "out_features": 18}, (5, 12)),
    "conv1d": Kind(
        nn.Conv1d,
        {"in_channels": 10, "out_channels": 12, "kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
        (10, 11),
    ),
    "conv2d": Kind(
        nn.Conv2d,
        {
            "in_channels": 10,
            "out_channels": 12,
            "kernel_size": (3, 5),
            "stride": (2, 1),
            "padding": (1, 3),
            "dilation": (1, 2),
        },
        (10, 9, 10),
    ),
    "conv2d-1x1": Kind(
        nn.Conv2d, {"in_channels": 10, "out_channels": 12, "kernel_size": 1, "stride": 2, "bias": False}, (10, 5, 7)
    ),
    "conv3d": Kind(
        nn.Conv3d,
        {"in_channels": 10, "out_channels": 12, "kernel_size": (3, 2, 3), "stride": (1, 2, 1), "padding": 1},
        (10, 4, 5, 4),
    ),
    "grouped": Kind(
        nn.Conv2d, {"in_channels": 40, "out_channels": 12, "kernel_size": 3, "padding": 1, "groups": 4}, (40, 5, 6)
    ),
    "depthwise": Kind(nn.Conv2d, {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "groups": 16}, (16, 5, 6)),
}


class Net(nn.Module):
    """A norm, a layer of some kind under a name with an underscore, and a head: (B, *row) -> (B, 3)."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"in_norm": nn.LayerNorm(kind.row[-1]), "in_layer": kind.build()})
        with torch.no_grad():
            width = self.body(torch.zeros(1, *kind.row)).shape[1]
        self.head = nn.Linear(width, 3)

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["in_layer"](self.block["in_norm"](x))
        return y.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y


def net(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(KINDS[kind]).to(dtype).eval()


def rows(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(99)
    return torch.randn(3, *KINDS[kind].row, dtype=dtype)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 1) -> None:
    """Give every parameter values that no initialisation gives; magnitudes stay positive."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("dora_scale"):
            parameter.uniform_(0.5, 2.0)
        else:
            parameter.normal_(0.0, 0.6)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def lycoris_file(path: Path, modules: Mapping[str, nn.Module]) -> Path:
    """What LyCORIS saves for modules of its own, by the name that it gives to each."""
    states = {name: module.state_dict() for name, module in modules.items()}
    return save(path, {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()})


def adapted(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of a base with gain * (W + dW) and overrides in place."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            parameters[name].copy_(parameters[name].double() + torch.from_numpy(delta.dense()))
        for name, gain in adapter.gains.items():
            parameters[name].copy_(parameters[name].double() * torch.tensor(gain, dtype=torch.float64))
        for name, value in adapter.overrides.items():
            parameters[name].copy_(torch.tensor(value))
    return model


def error_of(path: Path, base: nn.Module, x: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Relative error of a base with the file's adapter against the outputs that the library gave."""
    adapter = load_adapter(path, base=base, scale=scale)
    with torch.no_grad():
        plain, got = base(x), adapted(base, adapter)(x)
    assert distance(plain, expected) > 1e-2, "the library's adapter changes nothing, so nothing is compared"
    return distance(got, expected)


def distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    difference = float((got.double() - expected.double()).norm()) / float(expected.double().norm())
    assert math.isfinite(difference)
    return difference
