"""Whatever logits a row has: the token of the largest ones is that of all, or None."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest

from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.generation.sampling import Sampler, peaks
from tpeft_deploy.runtime.generation.top_logits.exact import TopRow, choose, decides
from tpeft_deploy.tucker import Array

KEPT = 16

GREEDY: list[dict[str, Any]] = [{}, {"logprobs": 3}, {"top_k": 4, "logprobs": 15}]
SAMPLED: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_k": 15, "top_p": 0.8, "min_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.5, "logprobs": 5},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_p": 0.95, "min_p": 0.2},
]


def any_row(draw: random.Random) -> Array:
    generator = np.random.default_rng(draw.randrange(1 << 32))
    row = generator.standard_normal(draw.choice([64, 100, 3000])) * draw.choice([0.0, 0.1, 2.0, 6.0, 1e19])
    kind = draw.randrange(5)
    if kind == 0:  # many ties
        row = np.round(row)
    elif kind == 1:  # a few far above the others, some of them equal
        row[generator.integers(0, len(row), 9)] = row.max() + np.abs(row).max() * generator.integers(1, 4, 9)
    elif kind == 2:
        row[generator.random(len(row)) < draw.choice([0.5, 0.95, 1.0])] = -np.inf
    elif kind == 3 and draw.random() < 0.5:
        row[generator.integers(0, len(row), 2)] = draw.choice([np.inf, np.nan, -0.0])
    return row.astype(np.float32)


def top_of(row: Array, how: Sampling, draw: random.Random) -> TopRow:
    """What a device finds: any of equal logits at the bound, and sums that are off by what they may be."""
    shuffled = np.array(draw.sample(range(len(row)), len(row)))
    tokens = np.sort(shuffled[np.argsort(-row[shuffled], kind="stable")[:KEPT]])
    with np.errstate(all="ignore"):
        divisor = np.float32(how.temperature or 1)
        sums = [
            float(np.exp(scaled - scaled.max()).sum(dtype=np.float64)) * (1 + draw.uniform(-5e-7, 5e-7))
            for scaled in (row, row / divisor)
        ]
    return TopRow(tokens, row[tokens], *sums)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(4))
def test_a_token_of_the_largest_logits_is_that_of_all(seed: int) -> None:
    draw, decided = random.Random(seed), 0
    for count in range(1200):
        settings = draw.choice(GREEDY + 3 * [{"temperature": draw.choice([1.0, 0.3, 1.7, 1e-30])}])
        if "temperature" in settings:
            settings = settings | draw.choice(SAMPLED)
        how, row = Sampling(seed=count, **settings), any_row(draw)
        sampler = Sampler(how, [1])
        sampler._position = draw.randrange(9)
        assert decides(sampler, KEPT)
        whole, before = copy.deepcopy(sampler), copy.deepcopy(vars(sampler))
        found = choose(top_of(row, how, draw), sampler)
        if found is None:
            assert repr(vars(sampler)) == repr(before)
            continue
        expected = whole.choose(row, peaks(row[None])[0])
        decided += 1
        assert found.id == expected.id
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]
        assert found.logprob == pytest.approx(expected.logprob, rel=1e-5, abs=1e-5)
        assert vars(sampler)["_counts"] == vars(whole)["_counts"]
        assert vars(sampler)["_position"] == vars(whole)["_position"]
    assert decided > 240


@pytest.mark.parametrize("settings", [{}, *({"temperature": 0.8} | each for each in SAMPLED if each != {"min_p": 1.0})])
def test_most_rows_of_a_model_are_decided(settings: dict[str, Any]) -> None:
    draw, decided = random.Random(0), 0
    for seed in range(100):
        row = (np.random.default_rng(seed).standard_normal(2000) * 6).astype(np.float32)
        sampler = Sampler(how := Sampling(seed=seed, **settings), [1])
        decided += choose(top_of(row, how, draw), sampler) is not None
    assert decided > 80


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": KEPT},
        {"logprobs": KEPT},
        {"logit_bias": {3: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": -0.1},
    ],
)
def test_what_needs_all_logits_is_left_to_them(settings: dict[str, Any]) -> None:
    assert not decides(Sampler(Sampling(**settings), [1]), KEPT)


def test_a_row_without_a_finite_logit_is_left_to_the_error_of_all() -> None:
    row = np.full(40, -np.inf, np.float32)
    sampler = Sampler(Sampling(), [1])
    with np.errstate(invalid="ignore"):
        assert choose(top_of(row, Sampling(), random.Random(0)), sampler) is None
    with pytest.raises(RunError, match="finite"), np.errstate(invalid="ignore"):
        sampler.choose(row)
