"""One small net per use of a weight: what the test matrix is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Inputs = dict[str, torch.Tensor]


class Single(nn.Module):
    """One layer between two nonlinearities."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(torch.sin(x)))


class Tokens(nn.Module):
    """A layer that takes integers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(ids))


class Normed(nn.Module):
    """A conv, a norm that an exporter may fold into it, and another conv."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 4, 1)
        for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.5, 2), ("bias", -1, 1)):
            nn.init.uniform_(getattr(self.norm, name), low, high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.relu(self.norm(self.layer(x))))
        return y


class ChannelsLast(nn.Module):
    """Depthwise convs of 16 channels, one of them in front of a change of layout, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.bare = nn.Conv2d(16, 16, 3, stride=2, dilation=2, groups=16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.bare(torch.tanh(self.layer(x))).permute(0, 2, 3, 1))
        return y


class FusedQkv(nn.Module):
    """One projection whose output is cut into three."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.layer(x).chunk(3, -1)
        y: torch.Tensor = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return y


class Attention(nn.Module):
    """nn.MultiheadAttention, which works sequence-major inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.layer(x, x, x, need_weights=False)
        y: torch.Tensor = self.head(mixed)
        return y


class Bare(nn.Module):
    """Tensors that no layer owns: in a product, in a sum, and both ways round."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Parameter(torch.randn(6, 5))
        self.table = nn.Parameter(torch.randn(4, 5))
        self.vector = nn.Parameter(torch.randn(5))
        self.both = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x @ self.product) * self.vector + self.table
        z: torch.Tensor = F.linear(y, self.both) @ self.both
        return z


class Tied(nn.Module):
    """A table that looks tokens up and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(12, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 12, bias=False)
        self.out.weight = self.layer.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.tanh(self.norm(self.layer(ids))))
        return y


class Positions(nn.Module):
    """A table of positions that every row shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.layer = nn.Embedding(9, 6)
        self.register_buffer("places", torch.arange(9)[None])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.words(ids) + self.layer(self.get_buffer("places")[:, : ids.shape[1]]))


class Shared(nn.Module):
    """One projection of the rows and of a table that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.layer(x) @ self.layer(self.table).transpose(1, 2), -1)


class Norms(nn.Module):
    """Norms of three kinds, as models of text have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.layer_norm, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.group(self.rms(torch.tanh(self.layer(self.layer_norm(x)))))
        return y


@dataclass(frozen=True)
class Case:
    """A net, the weights to change with their ranks, and how its rows may be served.

    Args:
        net: builds it.
        inputs: shapes of float inputs, or (shape, largest integer).
        targets: weight -> ranks.
        gains: weight -> modes that gains along may have.
        overrides: tensors to replace by others of their size.
        group: the changes for which the manifest must ask for one adapter per run.
        free: axes beside the batch that vary, by input.
    """

    net: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, tuple[int, ...]]
    gains: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    free: Mapping[str, dict[int, str]] = field(default_factory=dict)

    def build(self, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
        """The net with fixed weights, and inputs of two rows."""
        torch.manual_seed(5)
        module = self.net().eval().to(dtype)
        inputs = {
            name: torch.randint(0, 9, shape) if name == "ids" else torch.randn(shape).to(dtype)
            for name, shape in self.inputs.items()
        }
        return module, inputs


def _single(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Single(layer())


IMAGE = {"x": (2, 4, 9, 10)}
IMAGE_FREE = {"x": {2: "height", 3: "width"}}
SEQUENCE = {"x": (2, 4, 6)}
BOTH = {"layer.weight": (0, 1)}


def _conv(targets: tuple[int, ...] = (3, 2, 2, 2), **options: object) -> Case:
    layer = partial(nn.Conv2d, 4, 6, 3, **options)  # type: ignore[arg-type]
    grouped = options.get("groups", 1) != 1
    return Case(
        _single(layer),
        IMAGE,
        {"layer.weight": targets},
        BOTH,
        ("layer.weight", "layer.bias"),
        free={} if grouped else IMAGE_FREE,
    )


CASES: dict[str, Case] = {
    "linear, 2-D": Case(
        _single(lambda: nn.Linear(6, 5)), {"x": (2, 6)}, {"layer.weight": (3, 2)}, BOTH, ("layer.weight", "layer.bias")
    ),
    "linear, one output": Case(
        _single(lambda: nn.Linear(6, 1)), {"x": (2, 6)}, {"layer.weight": (1, 2)}, BOTH, ("layer.weight", "layer.bias")
    ),
    "linear, 3-D": Case(
        _single(lambda: nn.Linear(6, 5)),
        SEQUENCE,
        {"layer.weight": (3, 2)},
        BOTH,
        ("layer.weight", "layer.bias"),
        free={"x": {1: "sequence"}},
    ),
    "linear, NHWC": Case(_single(lambda: nn.Linear(6, 5, bias=False)), {"x": (2, 3, 4, 6)}, {"layer.weight": (3, 2)}),
    "fused qkv": Case(FusedQkv, SEQUENCE, {"layer.weight": (4, 3)}, BOTH, ("layer.bias",)),
    "transformers Conv1D": Case(
        _single(lambda: Conv1D(5, 6)), SEQUENCE, {"layer.weight": (3, 2)}, BOTH, ("layer.bias",)
    ),
    "conv1d": Case(
        _single(lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2, padding_mode="circular")),
        {"x": (2, 4, 11)},
        {"layer.weight": (3, 2, 4)},
        BOTH,
        ("layer.weight", "layer.bias"),
        free={"x": {2: "length"}},
    ),
    "conv2d, strided": _conv(stride=2, padding=1),
    "conv2d, dilated, replicate": _conv(dilation=2, padding=2, padding_mode="replicate"),
    "conv2d, reflect": _conv(padding=1, padding_mode="reflect"),
    "conv2d, same": _conv(padding="same"),
    "conv2d, 1x1": Case(_single(lambda: nn.Conv2d(4, 6, 1)), IMAGE, {"layer.weight": (3, 2, 1, 1)}, BOTH),
    "conv2d, grouped": _conv((3, 2, 2, 2), groups=2, padding=1),
    "conv2d, depthwise": Case(
        _single(lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4)),
        IMAGE,
        {"layer.weight": (4, 1, 3, 3)},
        BOTH,
        ("layer.weight", "layer.bias"),
    ),
    "depthwise, blocked": Case(
        ChannelsLast,
        {"x": (2, 16, 9, 11)},
        {"layer.weight": (4, 1, 3, 3), "bare.weight": (5, 1, 3, 2)},
        BOTH,
        ("layer.bias", "norm.weight"),
        free={"x": {2: "height", 3: "width"}},
    ),
    "conv3d": Case(
        _single(lambda: nn.Conv3d(2, 5, (1, 3, 2), padding=(0, 1, 1), bias=False)),
        {"x": (2, 2, 3, 5, 4)},
        {"layer.weight": (3, 2, 1, 2, 2)},
        BOTH,
    ),
    "conv with BatchNorm": Case(
        Normed,
        {"x": (2, 3, 6, 7)},
        {"layer.weight": (3, 2, 2, 2), "last.weight": (2, 3, 1, 1)},
        BOTH,
        ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "layer.bias"),
        free={"x": {2: "height", 3: "width"}},
    ),
    "transposed 1-D": Case(
        _single(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)),
        {"x": (2, 4, 7)},
        {"layer.weight": (3, 2, 2)},
        BOTH,
        ("layer.bias",),
        free={"x": {2: "length"}},
    ),
    "transposed 2-D, dilated": Case(
        _single(lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, dilation=2)),
        IMAGE,
        {"layer.weight": (3, 4, 2, 2)},
        BOTH,
    ),
    "transposed 3-D": Case(
        _single(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2)),
        {"x": (2, 2, 3, 2, 4)},
        {"layer.weight": (2, 3, 2, 2, 2)},
    ),
    "transposed, grouped": Case(
        _single(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), IMAGE, {"layer.weight": (3, 2, 2, 2)}, BOTH
    ),
    "embedding": Case(
        lambda: Tokens(nn.Embedding(12, 6)),
        {"ids": (2, 5)},
        {"layer.weight": (4, 3)},
        {"layer.weight": (1,)},
        ("layer.weight",),
        free={"ids": {1: "sequence"}},
    ),
    "tied embedding": Case(
        Tied, {"ids": (2, 5)}, {"layer.weight": (4, 3)}, {}, ("layer.weight", "norm.weight", "norm.bias")
    ),
    "positions that rows share": Case(
        Positions, {"ids": (2, 4)}, {"layer.weight": (3, 2), "words.weight": (3, 2)}, free={"ids": {1: "sequence"}}
    ),
    "a table that rows share": Case(Shared, {"x": (2, 3, 6)}, {"layer.weight": (3, 2)}, free={"x": {1: "sequence"}}),
    "attention": Case(
        Attention,
        {"x": (2, 5, 8)},
        {"layer.in_proj_weight": (4, 3), "layer.out_proj.weight": (3, 3), "head.weight": (2, 2)},
        {"layer.out_proj.weight": (0, 1)},
        group=("gain 0", "gain 1"),
        free={"x": {1: "sequence"}},
    ),
    "bare product": Case(Bare, SEQUENCE, {"product": (3, 2)}, {"product": (0, 1)}, ("vector",)),
    "bare sum": Case(Bare, SEQUENCE, {"table": (2, 2)}, group=("delta",)),
    "a product both ways round": Case(Bare, SEQUENCE, {"both": (2, 2)}, group=("delta",)),
    "norms": Case(
        Norms, SEQUENCE, {"layer.weight": (2, 2)}, {}, ("layer_norm.weight", "layer_norm.bias", "rms.weight")
    ),
    "group norm": Case(Norms, SEQUENCE, {"layer.weight": (2, 2)}, {}, ("group.weight",), group=("override",)),
}
