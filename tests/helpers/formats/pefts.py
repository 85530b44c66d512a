"""Adapters that PEFT itself builds, saves and runs, against what is read from its files."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import AdapterError
from tpeft_deploy.formats import load_adapter

__all__ = ["Vision", "change_config", "config_of", "error_of", "peft_model", "refusal", "save", "text", "vision"]


class Vision(nn.Module):
    """Convolutions of 1 to 3 dimensions with strides and paddings, of several groups, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(12, 12, 1, bias=False)
        self.grouped = nn.Conv2d(12, 24, (3, 2), padding=1, groups=3)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.line = nn.Conv1d(24, 12, 3, stride=2, padding=1)
        self.volume = nn.Conv3d(1, 2, (3, 3, 2), padding=(0, 1, 1))
        self.norm = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.volume(x[:, None]).sum((1, 2))[:, None, :, :8]
        y = torch.tanh(self.stem(x))
        y = torch.tanh(self.depthwise(self.grouped(y + self.point(y))))
        y = torch.tanh(self.norm(self.line(y.flatten(2))))
        y = torch.tanh(self.fc(y.mean(2)))
        out: Tensor = self.head(torch.tanh(self.square(y)))
        return out


class Text(nn.Module):
    """An embedding, a transformers Conv1D that is square and one that is not, and torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(20, 16)
        self.same = Conv1D(16, 16)
        self.wide = Conv1D(24, 16)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.query = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.wide(torch.tanh(self.same(self.embed(ids))))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = self.head(torch.tanh(self.query(y).mean(1)))
        return out


def vision(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = Vision().eval().to(dtype)
    return model, torch.randn(3, 3, 8, 8, dtype=dtype)


def text(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return Text().eval().to(dtype), torch.randint(0, 20, (3, 7))


def peft_model(base: nn.Module, config: Any, *, seed: int = 1, scale: float = 0.4) -> Any:
    """A PEFT model on a copy of the base, whose every adapter tensor is random, magnitudes and gains near 1."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    dtype = next(base.parameters()).dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # ranknum is trainable by mistake where the base is not float32, and is never saved.
            if not parameter.requires_grad or "ranknum" in name:
                continue
            near_one = any(part in name for part in ("magnitude", "ia3_", "delora_lambda"))
            factor = 0.5 + torch.rand_like(parameter) if near_one else torch.randn_like(parameter) * scale
            parameter.copy_(parameter * factor if "magnitude" in name else factor)
    return model.to(dtype).eval()


def save(model: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def adapted(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of a base with gain * (W + dW) and overrides in place."""
    model = copy.deepcopy(base)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in adapter.deltas.keys() | adapter.gains.keys():
            tensors[name].copy_(torch.from_numpy(adapter.merged(name, tensors[name].numpy())))
        for name, value in adapter.overrides.items():
            tensors[name].copy_(torch.tensor(value))
    return model


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y: Tensor = model(x)
    return y


def error_of(
    base: nn.Module,
    x: Tensor,
    config: Any,
    path: Path,
    *,
    change: Callable[[Any], None] | None = None,
    scale: float = 0.4,
) -> tuple[float, Adapter]:
    """Relative error of a base with the adapter that was read, against the model that PEFT trained; and the adapter."""
    model = peft_model(base, config, scale=scale)
    if change is not None:
        with torch.no_grad():
            change(model)
    expected = run(model, x)
    assert distance(run(base, x), expected) > 2e-3, "the adapter changes nothing, so nothing is compared"
    adapter = load_adapter(save(model, path), base=base)
    return distance(run(adapted(base, adapter), x), expected), adapter


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def change_config(path: Path, **fields: Any) -> Path:
    """Change fields of a saved configuration; None takes a field out."""
    config = config_of(path) | fields
    config = {name: value for name, value in config.items() if value is not None or name not in fields}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def refusal(path: Path, base: nn.Module | None = None, **arguments: Any) -> str:
    import pytest

    with pytest.raises(AdapterError) as caught:
        load_adapter(path, base=base, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message
