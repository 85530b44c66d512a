"""Probabilities of the tokens that temperature, top-k, top-p and min-p leave."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tpeft_deploy.tucker import Array

if TYPE_CHECKING:
    from tpeft_deploy.runtime.generation.sampling import Sampling

__all__ = ["divisor", "filtered", "limited", "tempered"]

_HOTTEST = 1e20  # largest temperature; this keeps float32 from overflow, as its inverse does
_LIKELY = 1024  # tokens that usually hold the mass of top-p


def filtered(scores: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Tokens that top-k, top-p and min-p leave, ascending, and their probabilities.

    Args:
        scores: logits after bias and penalties.
        sampling: how; its temperature is above 0.
    """
    tokens = _numbered(len(scores))
    scores = tempered(scores, sampling)
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        tokens = np.flatnonzero(scores >= least)
        scores = scores[tokens]
    return limited(tokens, scores, sampling)


def divisor(sampling: Sampling) -> np.float32:
    """Temperature, above 0, within the bounds of float32."""
    return np.float32(min(max(sampling.temperature, 1 / _HOTTEST), _HOTTEST))


def tempered(scores: Array, sampling: Sampling) -> Array:
    """Scores divided by the temperature, below the largest, which has 0."""
    scores = scores / divisor(sampling)
    difference: Array = scores - scores.max()  # exact for the softmax, and keeps a tiny temperature from infinity
    return difference


@lru_cache(maxsize=4)
def _numbered(size: int) -> Array:
    """Tokens of a vocabulary, which nobody may change."""
    tokens: Array = np.arange(size)
    tokens.flags.writeable = False
    return tokens


def limited(tokens: Array, scores: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Tokens that top-p and min-p leave of those that top-k left, and their probabilities.

    Args:
        tokens: tokens, ascending.
        scores: their logits, as `tempered` gives them; the largest is 0.
        sampling: how.
    """
    probabilities = _softmax(scores)
    if sampling.top_p < 1:
        kept = _nucleus(probabilities, sampling.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
        probabilities = probabilities / probabilities.sum()
    if sampling.min_p > 0:
        kept = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        tokens, probabilities = tokens[kept], probabilities[kept]
        probabilities = probabilities / probabilities.sum()
    return tokens, probabilities


def _nucleus(probabilities: Array, top_p: float) -> Array:
    """Indices, ascending, that are left when as many of the least probable are removed as have at most `1 - top_p`."""
    likely: Array | None = None
    rest = 0.0
    if len(probabilities) > _LIKELY:
        # The others are removed in any case where the most probable have enough, and sorting all takes milliseconds.
        some = np.flatnonzero(probabilities >= np.partition(probabilities, -_LIKELY)[-_LIKELY])
        others = max(1 - float(probabilities[some].sum()), 0.0)
        if others <= 1 - top_p:
            likely, rest = some, others
    ascending = (probabilities if likely is None else probabilities[likely]).argsort(kind="stable")
    if likely is not None:
        ascending = likely[ascending]
    removed = int((rest + probabilities[ascending].cumsum()).searchsorted(1 - top_p, side="right"))
    kept: Array = ascending[min(removed, len(ascending) - 1) :]
    kept.sort()
    return kept


def _softmax(scores: Array) -> Array:
    exponentials: Array = np.exp(scores, dtype=np.float64)
    exponentials /= exponentials.sum()
    return exponentials
