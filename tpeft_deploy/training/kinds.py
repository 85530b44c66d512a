"""Adapted layers: one class per layer type, with its forward through the factors and through dW."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tpeft_deploy.training.contraction import contract
from tpeft_deploy.training.layer import TuckerLayer

__all__ = [
    "KINDS",
    "TuckerConv",
    "TuckerConvTranspose",
    "TuckerEmbedding",
    "TuckerLinear",
    "TuckerTransposedLinear",
]

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


class TuckerLinear(TuckerLayer):
    """A linear layer, weight (O, I)."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    base_layer: nn.Linear

    def _is_stock(self) -> bool:
        return type(self.base_layer).forward is nn.Linear.forward

    def _multiplications(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        (size_o, size_i), (rank_o, rank_i) = self.base_weight.shape, ranks
        factored = (rank_i < size_i) * size_i * rank_i + rank_i * rank_o + (rank_o < size_o) * rank_o * size_o
        return factored, size_o * size_i

    def _positions(self, x: Tensor) -> float:
        return x.numel() / self.base_layer.in_features

    def _through_factors(self, x: Tensor, core: Tensor, factors: dict[int, Tensor]) -> Tensor:
        x = functional.linear(x @ factors[1] if 1 in factors else x, core)
        return functional.linear(x, factors[0]) if 0 in factors else x

    def _through_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        return functional.linear(x, delta)


class TuckerTransposedLinear(TuckerLayer):
    """Conv1D of transformers (GPT-2), a linear layer with weight (I, O), y = x W."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (Conv1D,)
    base_layer: Conv1D

    def _is_stock(self) -> bool:
        return type(self.base_layer).forward is Conv1D.forward

    def _multiplications(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        (size_i, size_o), (rank_i, rank_o) = self.base_weight.shape, ranks
        factored = (rank_i < size_i) * size_i * rank_i + rank_i * rank_o + (rank_o < size_o) * rank_o * size_o
        return factored, size_o * size_i

    def _positions(self, x: Tensor) -> float:
        return x.numel() / self.base_weight.shape[0]

    def _through_factors(self, x: Tensor, core: Tensor, factors: dict[int, Tensor]) -> Tensor:
        x = (x @ factors[0] if 0 in factors else x) @ core
        return functional.linear(x, factors[1]) if 1 in factors else x

    def _through_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        return x @ delta


class TuckerConv(TuckerLayer):
    """A convolution of 1 to 3 dimensions, weight (O, I per group, K1, ...), with any padding, stride and dilation."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def _is_stock(self) -> bool:
        kind: Any = type(self.base_layer)
        (stock,) = (ancestor for ancestor in kind.__mro__ if ancestor in self.adapts)
        return kind.forward is stock.forward and kind._conv_forward is stock._conv_forward

    def _multiplications(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        size_o, size_i, *kernel = self.base_weight.shape
        rank_o, rank_i = ranks[:2]
        dense = size_o * size_i * math.prod(kernel)
        if self.base_layer.groups > 1:
            # The factors would be repeated for every group.
            return math.inf, dense
        # The first 1x1 convolution runs at input positions: with a stride these outnumber the output positions.
        into = (rank_i < size_i) * size_i * rank_i * math.prod(self.base_layer.stride)
        return into + rank_i * rank_o * math.prod(kernel) + (rank_o < size_o) * rank_o * size_o, dense

    def _positions(self, x: Tensor) -> float:
        return x.numel() / self.base_layer.in_channels / math.prod(self.base_layer.stride)

    def _through_factors(self, x: Tensor, core: Tensor, factors: dict[int, Tensor]) -> Tensor:
        rank_o, rank_i, *window = core.shape
        pointwise, ones = _CONVOLUTIONS[len(window)], [1] * len(window)
        kernel = contract(core, {mode: factor for mode, factor in factors.items() if mode >= 2})
        if 1 in factors:
            x = pointwise(x, factors[1].T.reshape(rank_i, -1, *ones))
        # Padding may follow the 1x1 convolution: it repeats positions or adds zeros, and the convolution has no bias.
        x = self._through_delta(x, kernel)
        return pointwise(x, factors[0].reshape(-1, rank_o, *ones)) if 0 in factors else x

    def _through_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        # torch's method, with the stride, padding, dilation and groups of the base.
        output: Tensor = self.base_layer._conv_forward(x, delta, None)
        return output


class TuckerConvTranspose(TuckerLayer):
    """A transposed convolution of 1 to 3 dimensions, weight (I, O per group, K1, ...)."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    base_layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

    def _is_stock(self) -> bool:
        kind: Any = type(self.base_layer)
        (stock,) = (ancestor for ancestor in kind.__mro__ if ancestor in self.adapts)
        return kind.forward is stock.forward and kind._output_padding is stock._output_padding

    def _multiplications(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        size_i, size_o, *kernel = self.base_weight.shape
        rank_i, rank_o = ranks[:2]
        dense = size_o * size_i * math.prod(kernel)
        if self.base_layer.groups > 1:
            return math.inf, dense  # as TuckerConv
        # The last 1x1 convolution runs at output positions: with a stride these outnumber the input positions.
        out_of = (rank_o < size_o) * rank_o * size_o * math.prod(self.base_layer.stride)
        return (rank_i < size_i) * size_i * rank_i + rank_i * rank_o * math.prod(kernel) + out_of, dense

    def _positions(self, x: Tensor) -> float:
        return x.numel() / self.base_layer.in_channels

    def _through_factors(
        self, x: Tensor, core: Tensor, factors: dict[int, Tensor], output_size: list[int] | None = None
    ) -> Tensor:
        rank_i, rank_o, *window = core.shape
        pointwise, ones = _CONVOLUTIONS[len(window)], [1] * len(window)
        kernel = contract(core, {mode: factor for mode, factor in factors.items() if mode >= 2})
        if 0 in factors:
            x = pointwise(x, factors[0].T.reshape(rank_i, -1, *ones))
        x = self._through_delta(x, kernel, output_size)
        return pointwise(x, factors[1].reshape(-1, rank_o, *ones)) if 1 in factors else x

    def _through_delta(self, x: Tensor, delta: Tensor, output_size: list[int] | None = None) -> Tensor:
        base: Any = self.base_layer
        axes = delta.ndim - 2
        shape = base.stride, base.padding, base.kernel_size, axes, base.dilation
        output_padding = base._output_padding(x, output_size, *shape)
        return _TRANSPOSED[axes](x, delta, None, base.stride, base.padding, output_padding, base.groups, base.dilation)


class TuckerEmbedding(TuckerLayer):
    """An embedding, weight (num, dim)."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    base_layer: nn.Embedding

    def _check_base(self) -> None:
        super()._check_base()
        if self.base_layer.max_norm is not None:
            raise ValueError("its max_norm rescales the weight in the forward pass, so no change can be added to it")

    def _is_stock(self) -> bool:
        return type(self.base_layer).forward is nn.Embedding.forward

    def _multiplications(self, ranks: tuple[int, ...]) -> tuple[float, float]:
        (num, dim), (rank_num, rank_dim) = self.base_weight.shape, ranks
        return (rank_num < num) * rank_num * rank_dim + (rank_dim < dim) * rank_dim * dim, 0

    def _positions(self, x: Tensor) -> float:
        return x.numel()

    def _branch(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        core, factors = self._parts(name)
        change = self._change(name, x, core, factors, *args, **kwargs)
        padding = self.base_layer.padding_idx
        if padding is not None:
            # As in torch, the padding entry has no gradient.
            change = torch.where((x == padding).unsqueeze(-1), change.detach(), change)
        dropped: Tensor = self.tucker_dropout[name](change)
        return dropped

    def _through_factors(self, x: Tensor, core: Tensor, factors: dict[int, Tensor]) -> Tensor:
        rows = functional.embedding(x, factors[0]) @ core if 0 in factors else functional.embedding(x, core)
        return functional.linear(rows, factors[1]) if 1 in factors else rows

    def _through_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        return functional.embedding(x, delta)


KINDS: tuple[type[TuckerLayer], ...] = (
    TuckerLinear,
    TuckerConv,
    TuckerEmbedding,
    TuckerTransposedLinear,
    TuckerConvTranspose,
)
