"""Small models of every kind of layer, and adapters for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.tucker import TuckerDelta

DIGEST_LENGTH = 64


class ConvNet(nn.Module):
    """Strided stem, depthwise and grouped convs, batch norm, NHWC linears, layer norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 4, stride=2, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.grouped(self.depthwise(self.stem(pixels)))).permute(0, 2, 3, 1)
        return {"logits": self.head(torch.relu(self.up(self.layer_norm(x))).mean((1, 2)))}


class TwiceNet(nn.Module):
    """One linear registered under two names: (B, 4) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return result


def twice_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    return TwiceNet().eval(), {"x": torch.randn(2, 4)}


class TextNet(nn.Module):
    """Embedding tied to the output, a linear used twice, 3-D linears without bias: (B, S) -> (B, S, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(torch.tanh(self.mix(self.embedding(ids))))
        logits: torch.Tensor = self.out(x)
        return logits


class AttentionNet(nn.Module):
    """nn.MultiheadAttention lays its rows out sequence-major: rows of different adapters cannot be mixed blindly."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        scores: torch.Tensor = self.head(mixed.mean(1))
        return scores


class VolumeNet(nn.Module):
    """Convolutions of one and three dimensions, with and without bias, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 6, 5, stride=2, padding=2, padding_mode="circular")
        self.volume = nn.Conv3d(2, 5, (1, 3, 2), padding=(0, 1, 1), dilation=(1, 1, 2), bias=False)
        self.strided = nn.Conv3d(5, 4, 3, stride=2, padding=1, bias=False)
        self.back = nn.ConvTranspose1d(6, 4, 3, stride=2)

    def forward(self, signal: torch.Tensor, volume: torch.Tensor) -> dict[str, torch.Tensor]:
        line = self.back(torch.tanh(self.line(signal)))
        return {"waves": line, "blocks": self.strided(torch.tanh(self.volume(volume)))}


def volume_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    return VolumeNet().eval(), {"signal": torch.randn(2, 3, 11), "volume": torch.randn(2, 2, 4, 6, 5)}


def conv_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory as the command line takes it."""
    torch.manual_seed(0)
    return ConvNet().eval(), {"pixels": torch.randn(2, 1, 12, 14)}


def text_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return TextNet().eval(), {"ids": torch.randint(0, 20, (2, 5))}


def attention_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    return AttentionNet().eval(), {"x": torch.randn(2, 4, 8)}


def delta(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int, scale: float = 0.7) -> TuckerDelta:
    """A random delta whose norm is comparable to a weight's; a rank of a mode's size gives an identity factor."""
    random = np.random.default_rng(seed)
    ranks = tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))
    factors = tuple(
        random.standard_normal((size, rank)).astype(np.float32) / np.float32(np.sqrt(size)) if rank < size else None
        for size, rank in zip(shape, ranks, strict=True)
    )
    return TuckerDelta(random.standard_normal(ranks).astype(np.float32) / 2, factors, scale)


def adapter_for(
    module: nn.Module,
    targets: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    overrides: Mapping[str, tuple[int, ...]] | None = None,
) -> Adapter:
    """A random adapter: target -> ranks, override -> shape."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    random = np.random.default_rng(seed + 1000)
    deltas = {
        name: delta(tuple(weights[name].shape), ranks, seed + i) for i, (name, ranks) in enumerate(targets.items())
    }
    return Adapter(
        deltas,
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in (overrides or {}).items()},
        {name: weight_digest(weights[name].detach().numpy()) for name in deltas},
    )


def conv_adapters(module: nn.Module) -> dict[str, Adapter]:
    """Mixed ranks, a partial adapter, and heads of three sizes."""
    full = {"stem.weight": (3, 3, 4, 2), "depthwise.weight": (4, 1, 5, 5), "grouped.weight": (3, 2, 2, 3)}
    linears = {"up.weight": (5, 3)}
    return {
        "plain": adapter_for(module, {**full, **linears}, seed=1),
        "partial": adapter_for(module, {"depthwise.weight": (2, 1, 3, 3)}, seed=2),
        "two": adapter_for(
            module, {**full, "up.weight": (2, 7)}, seed=3, overrides={"head.weight": (2, 16), "head.bias": (2,)}
        ),
        "wide": adapter_for(
            module, {"stem.weight": (6, 1, 2, 4)}, seed=4, overrides={"head.weight": (17, 16), "head.bias": (17,)}
        ),
    }


class Tagger(nn.Module):
    """A head on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.mix(self.embedding(ids))))
        return logits
