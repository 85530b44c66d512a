"""What all examples share: adapters that PEFT saves and merges, and errors of whole answers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
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


def error(found: Array, wanted: Array) -> float:
    """Largest difference relative to the largest value; shapes must be equal."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
