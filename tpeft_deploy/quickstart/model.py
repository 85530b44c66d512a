"""The quickstart's base: a small ConvNeXt V2 for 16x16 digits.

(Woo et al., arXiv 2301.00808.)  It has every kind of weight that a convolutional tensor adapter changes: a full
convolution (stem, downsampling), depthwise convolutions, and pointwise linears on (B, H, W, C).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tpeft_deploy.quickstart.data import SIZE

__all__ = ["WEIGHTS", "DigitsNet", "digits", "trained"]

WEIGHTS = "base.safetensors"
_WIDTHS = (32, 64)
_EXPANSION = 3


class ResponseNorm(nn.Module):
    """Global response normalisation over (B, H, W, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        response = features.square().sum(dim=(1, 2), keepdim=True).add(1e-6).sqrt()
        relative = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        # features + gamma * (features * relative) + beta, with the products on the small tensors.
        return features * (1 + self.gamma * relative) + self.beta


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then two pointwise linears, around a residual."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, _EXPANSION * width)
        self.respond = ResponseNorm(_EXPANSION * width)
        self.reduce = nn.Linear(_EXPANSION * width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        inner = self.norm(self.depthwise(features).permute(0, 2, 3, 1))
        inner = self.reduce(self.respond(nn.functional.gelu(self.expand(inner))))
        result: Tensor = features + inner.permute(0, 3, 1, 2)
        return result


class DigitsNet(nn.Module):
    """Pixels (B, 1, 16, 16) in [0, 1] -> {"logits": (B, 10)}."""

    def __init__(self) -> None:
        super().__init__()
        narrow, wide = _WIDTHS
        self.stem = nn.Conv2d(1, narrow, 4, stride=2, padding=1)
        self.early = ConvNeXtBlock(narrow, kernel=7)
        self.downsample = nn.Conv2d(narrow, wide, 2, stride=2)
        self.late = ConvNeXtBlock(wide, kernel=5)
        self.norm = nn.LayerNorm(wide)
        self.head = nn.Linear(wide, 10)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 1, 16, 16) -> {"logits": (B, 10)}; the head takes the mean over all positions."""
        features = self.late(self.downsample(self.early(self.stem(pixels))))
        return {"logits": self.head(self.norm(features.mean(dim=(2, 3))))}


def digits() -> tuple[DigitsNet, dict[str, Tensor]]:
    """Create the base with untrained weights, and example inputs for tracing."""
    return DigitsNet().eval(), {"pixels": torch.zeros(2, 1, SIZE, SIZE).uniform_(generator=torch.Generator())}


def trained(directory: str | Path) -> tuple[DigitsNet, dict[str, Tensor]]:
    """Load the base with the weights that a quickstart saved in `directory`, and example inputs for tracing."""
    from safetensors.torch import load_file

    module, example_inputs = digits()
    module.load_state_dict(load_file(Path(directory) / WEIGHTS))
    return module, example_inputs
