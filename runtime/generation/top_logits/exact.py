"""Tokens from the largest logits of a row: the token that all logits give, or None where they may give another.

A row's largest logits are complete above the smallest of them; which of those equal to the smallest are among them
depends on the kernel.  So nothing here depends on those, nor on a sum beyond what it is known to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tpeft_deploy.runtime.generation.probabilities import divisor, limited, tempered
from tpeft_deploy.runtime.generation.sampling import Sampler, Sampling, Token, most_probable
from tpeft_deploy.tucker import Array

__all__ = ["TopRow", "choose", "decides", "needs_mass"]

_SUM_ERROR = 1e-6  # relative, of a float64 sum of float32 exponentials
_FARTHEST = 40.0  # below the largest score: what is farther adds nothing to a sum
_ROUNDING = 1e-9  # relative, far above that of float64


@dataclass(frozen=True, slots=True)
class TopRow:
    """The largest logits of a row, and sums over all of it.

    Attributes:
        tokens: tokens, ascending.
        logits: their logits, float32.
        total: sum of exp(logit - largest) over the row; NaN where no log-probability is wanted.
        tempered: the same of logits divided by the temperature.
    """

    tokens: Array
    logits: Array
    total: float
    tempered: float


def needs_mass(sampling: Sampling) -> bool:
    """Whether a choice depends on the probability mass of the row, so on its sum at the temperature."""
    return sampling.temperature > 0 and not sampling.top_k and sampling.top_p < 1


def decides(sampler: Sampler, kept: int) -> bool:
    """Whether the largest logits may decide a choice.

    Args:
        sampler: sampler of the sequence.
        kept: number of largest logits.
    """
    how = sampler.sampling
    bounded = how.temperature == 0 or how.top_k or how.top_p < 1 or how.min_p > 0
    return bool(bounded) and not sampler.adjusts and max(how.top_k if how.temperature else 0, how.logprobs) < kept


def choose(row: TopRow, sampler: Sampler) -> Token | None:
    """Choose the token that `Sampler.choose` chooses from all logits; None, and nothing changed, where it is not known.

    Args:
        row: largest logits.
        sampler: sampler that `decides`.
    """
    how = sampler.sampling
    highest, least = float(row.logits.max()), float(row.logits.min())
    if not (math.isfinite(highest) and math.isfinite(row.tempered) and highest > least):
        return None
    if how.logprobs and np.partition(row.logits, -how.logprobs)[-how.logprobs] <= least:
        return None
    index = int(row.logits.argmax()) if how.temperature == 0 else _drawn(row, sampler)
    if index is None:
        return None
    norm = highest + math.log(row.total)
    top = tuple((int(row.tokens[place]), found) for place, found in most_probable(row.logits, how.logprobs, norm))
    token = int(row.tokens[index])
    sampler.accept(token)
    return Token(token, float(row.logits[index]) - norm, top)


def _drawn(row: TopRow, sampler: Sampler) -> int | None:
    """Index of the token that is drawn."""
    how = sampler.sampling
    scores = tempered(row.logits, how)
    if not math.isfinite(scores.max()):  # more than float32 holds, divided by a tiny temperature
        return None
    if not how.top_k:
        return _drawn_of_mass(row, scores, sampler)
    bound = np.partition(scores, -how.top_k)[-how.top_k]
    if bound <= scores.min():
        return None
    indices = np.flatnonzero(scores >= bound)
    return sampler.draw(*limited(indices, scores[indices], how))  # of the arrays that all logits give


def _drawn_of_mass(row: TopRow, scores: Array, sampler: Sampler) -> int | None:
    """The same without top-k, where probabilities are known up to the error of the row's sum."""
    how = sampler.sampling
    exponentials = np.exp(scores.astype(np.float64))
    indices: Array | None = np.arange(len(scores))
    if how.top_p < 1:
        indices = _nucleus(row, scores, exponentials, how)
    elif not exponentials.min() < how.min_p * (1 - _ROUNDING):
        return None
    if indices is None:
        return None
    if how.min_p > 0:
        relative = exponentials[indices] / how.min_p  # the most probable has exponential 1
        if (np.abs(relative - 1)[scores[indices] < 0] <= _ROUNDING).any():
            return None
        indices = indices[(relative >= 1) | (scores[indices] == 0)]
    cumulative = exponentials[indices].cumsum()
    point = sampler.random() * cumulative[-1]
    if (np.abs(cumulative[:-1] - point) <= _ROUNDING * cumulative[-1]).any():
        return None
    return int(indices[min(int(cumulative.searchsorted(point, side="right")), len(indices) - 1)])


def _nucleus(row: TopRow, scores: Array, exponentials: Array, how: Sampling) -> Array | None:
    """Indices, ascending, that top-p leaves."""
    eps = float(np.finfo(np.float32).eps)
    slack = _SUM_ERROR + 2 * eps * (abs(float(row.logits.max())) / float(divisor(how)) + _FARTHEST)
    probabilities = exponentials / row.tempered
    order = probabilities.argsort(kind="stable")
    masses = 1 - float(probabilities.sum()) + probabilities[order].cumsum()
    removed = masses <= 1 - how.top_p
    removed[-1] = False
    first = int(removed.argmin())
    if not first or scores[order[first]] <= scores.min():
        return None  # others may stay
    last, next_one = order[first - 1], order[first]
    apart = exponentials[last] < exponentials[next_one] * (1 - _ROUNDING) or scores[last] == scores[next_one]
    if not apart or (np.abs(masses[:-1] - (1 - how.top_p)) <= slack).any():
        return None
    return np.sort(order[first:])
