"""Embeddings of texts from the states of their tokens, as sentence-transformers makes them."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.bundle.text_files import Pooling
from tpeft_deploy.tucker import Array

__all__ = ["cut", "pool"]


def pool(states: Array, pooling: Pooling) -> Array:
    """Embeddings (texts, width) in float32 of states (texts, tokens, width) without padding."""
    wide = states.astype(np.float32, copy=False)
    if pooling.mode == "mean":
        found: Array = wide.mean(axis=1)
    else:
        found = wide[:, 0 if pooling.mode == "cls" else -1]
    return _normalized(found) if pooling.normalize else found


def cut(embedding: Array, size: int, pooling: Pooling) -> Array:
    """The first entries of an embedding, of length 1 again if it had that."""
    return _normalized(embedding[:size]) if pooling.normalize else embedding[:size]


def _normalized(found: Array) -> Array:
    lengths: Array = np.linalg.norm(found, axis=-1, keepdims=True)
    return found / np.maximum(lengths, 1e-12)
