"""What the examples of vision models share: all outputs of a model, and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from examples.families.answers import error
from tpeft_deploy.tucker import Array


def outputs(model: Any, pixels: torch.Tensor) -> list[Array]:
    """All tensors that a model returns, in order: feature maps one by one."""
    with torch.no_grad():
        found = model(pixel_values=pixels).to_tuple()
    return [own.numpy() for value in found for own in (value if isinstance(value, tuple) else (value,))]


def worst(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> float:
    """Largest error of an output of a row."""
    rows = zip(found, wanted, strict=True)
    return max(error(one, other) for row, own in rows for one, other in zip(row, own, strict=True))
