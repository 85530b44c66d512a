"""Saved models of transformers, small and with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32}


def saved(path: Path, name: str, **sizes: Any) -> Path:
    """A model of random weights, all of them other than those a config alone would give."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path
