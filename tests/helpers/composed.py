"""Outputs of a torch model with a weighted set of adapters merged in float64, and the error against them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from tpeft_deploy import Adapter

Parts = Mapping[str, tuple[Adapter, float]]


def merged(module: nn.Module, parts: Parts, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The oracle: W + sum s_k dW_k in float64, in a model that runs in float64."""
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    weights = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in module.state_dict().items()
    }
    for adapter, strength in parts.values():
        for name, delta in adapter.deltas.items():
            weights[name] = weights[name] + strength * torch.from_numpy(delta.dense())
        weights |= {name: torch.from_numpy(array).double() for name, array in adapter.overrides.items()}
    for adapter, _ in parts.values():
        for name, gain in adapter.gains.items():
            weights[name] = weights[name] * torch.from_numpy(gain).double()
    changed = {name for adapter, _ in parts.values() for name in (*adapter.deltas, *adapter.overrides, *adapter.gains)}
    with torch.no_grad():
        out = functional_call(module.double(), {name: weights[name] for name in changed}, (), exact, tie_weights=False)
        module.float()
    first: torch.Tensor = out["logits"] if isinstance(out, dict) else out
    return first


def relative(got: np.ndarray, expected: torch.Tensor) -> float:
    assert got.shape == tuple(expected.shape)
    return float(np.linalg.norm(got - expected.numpy()) / np.linalg.norm(expected.numpy()))
