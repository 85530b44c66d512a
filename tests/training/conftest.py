"""Layers of every kind and geometry, and a small net that holds most of them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tpeft_deploy.training  # noqa: F401  (registers the method)


class Case(NamedTuple):
    """A layer, an input for it, and ranks that leave a factor at every mode that is larger than 1."""

    layer: nn.Module
    x: Tensor
    ranks: list[int | float]


def _conv(dimensions: int, size: int = 9, channels: int = 6, **options: object) -> Callable[[], Case]:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    ranks: list[int | float] = [3, 2, *[2] * dimensions]

    def build() -> Case:
        arguments = {"kernel_size": 3, "out_channels": 6} | options
        layer = kind(channels, **arguments)  # type: ignore[arg-type]
        return Case(layer.double(), torch.randn(2, channels, *[size] * dimensions, dtype=torch.float64), ranks)

    return build


def _transposed(dimensions: int, size: int = 5, channels: int = 6, **options: object) -> Callable[[], Case]:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimensions]
    ranks: list[int | float] = [3, 2, *[2] * dimensions]

    def build() -> Case:
        layer = kind(channels, **{"kernel_size": 3, "out_channels": 8} | options)  # type: ignore[arg-type]
        return Case(layer.double(), torch.randn(2, channels, *[size] * dimensions, dtype=torch.float64), ranks)

    return build


LAYERS: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(nn.Linear(7, 5).double(), torch.randn(2, 3, 7).double(), [3, 2]),
    "linear-no-bias": lambda: Case(nn.Linear(7, 5, bias=False).double(), torch.randn(4, 7).double(), [3, 2]),
    "conv1d": _conv(1, padding=1),
    "conv1d-same-dilated": _conv(1, padding="same", dilation=2),
    "conv1d-stride": _conv(1, stride=2, padding=2, kernel_size=5),
    "conv1d-depthwise": _conv(1, groups=6, padding=1),
    "conv2d": _conv(2),
    "conv2d-valid-stride": _conv(2, padding="valid", stride=(2, 1)),
    "conv2d-same-even": _conv(2, padding="same", kernel_size=(4, 3)),
    "conv2d-reflect": _conv(2, padding=(1, 2), padding_mode="reflect"),
    "conv2d-replicate": _conv(2, padding=1, padding_mode="replicate", stride=2),
    "conv2d-circular-same": _conv(2, padding="same", padding_mode="circular", dilation=2),
    "conv2d-groups": _conv(2, groups=2, padding=1, out_channels=8),
    "conv2d-depthwise-reflect": _conv(2, groups=6, padding=1, padding_mode="reflect", out_channels=12),
    "conv2d-dilated-stride": _conv(2, dilation=2, stride=2, padding=3),
    "conv2d-pointwise": _conv(2, kernel_size=1),
    "conv3d": _conv(3, size=5, padding=1, stride=(1, 2, 1)),
    "conv3d-groups": _conv(3, size=4, groups=2, dilation=(1, 1, 1)),
    "conv3d-circular": _conv(3, size=4, padding=1, padding_mode="circular"),
    "transposed1d": _transposed(1, stride=2, output_padding=1),
    "transposed1d-depthwise": _transposed(1, groups=6, out_channels=12),
    "transposed2d": _transposed(2, dilation=2, padding=1, bias=False),
    "transposed2d-groups": _transposed(2, groups=2, stride=(2, 3), output_padding=(1, 0)),
    "transposed3d": _transposed(3, size=3, stride=2, padding=1),
    "gpt2-conv1d": lambda: Case(Conv1D(5, 7).double(), torch.randn(2, 3, 7).double(), [3, 2]),
    "embedding": lambda: Case(nn.Embedding(11, 6).double(), torch.randint(0, 11, (2, 4)), [3, 2]),
    "embedding-padding": lambda: Case(nn.Embedding(11, 6, padding_idx=0).double(), torch.tensor([[0, 3, 3]]), [3, 2]),
}


class Net(nn.Module):
    """Token ids (B, L) -> logits (B, 3), through an embedding, convolutions, BatchNorm and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.stem = nn.Conv1d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, padding="same", padding_mode="circular")
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.stem(self.embed(ids).transpose(1, 2))).relu()
        logits: Tensor = self.head(self.hidden(self.depthwise(x).mean(-1)).relu())
        return logits


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> Case:
    return LAYERS[request.param]()


@pytest.fixture
def make_net() -> Callable[[], Net]:
    """The same base every time."""

    def build() -> Net:
        torch.manual_seed(1)
        return Net().eval()

    return build


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 20, (4, 7))
