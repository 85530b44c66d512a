"""What the examples of vision models share: adapters that PEFT saves and merges, and errors of whole answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model

from tpeft_deploy.tucker import Array

LIMIT = 1e-5  # relative error of an answer in float32


def adapted(base: Any, config: PeftConfig) -> Any:
    """Let PEFT add an adapter to a model."""
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
        return get_peft_model(base, config).eval()


def merged(model: Any, place: Path) -> Any:
    """Save the adapter of a model, and return the model with it merged by PEFT."""
    model.save_pretrained(str(place))
    return model.merge_and_unload().eval()


def outputs(model: Any, pixels: torch.Tensor) -> list[Array]:
    """All tensors that a model returns, in order: feature maps one by one."""
    with torch.no_grad():
        found = model(pixel_values=pixels).to_tuple()
    return [own.numpy() for value in found for own in (value if isinstance(value, tuple) else (value,))]


def error(found: Array, wanted: Array) -> float:
    """Largest difference relative to the largest value; shapes must be equal."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def worst(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> float:
    """Largest error of an output of a row."""
    rows = zip(found, wanted, strict=True)
    return max(error(one, other) for row, own in rows for one, other in zip(row, own, strict=True))
