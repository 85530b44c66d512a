from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from tpeft_deploy.errors import InputError, RunError
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.generation.probabilities import filtered
from tpeft_deploy.runtime.generation.sampling import Sampler, peaks
from tpeft_deploy.tucker import Array

VOCABULARY = 97


def logits(seed: int, scale: float = 4.0, vocabulary: int = VOCABULARY) -> Array:
    return (np.random.default_rng(seed).standard_normal(vocabulary) * scale).astype(np.float32)


def distribution(how: Sampling, raw: Array, prompt: list[int], generated: list[int]) -> Array:
    sampler = Sampler(how, prompt)
    sampler._counts = Counter(generated)
    tokens, probabilities = filtered(sampler._adjusted(raw), how)
    full = np.zeros(len(raw))
    full[tokens] = probabilities
    return full


def oracle(how: Sampling, raw: Array, seen: list[int]) -> Array:
    """What transformers' own processors make of the logits, in its order (`GenerationMixin._get_logits_processor`)."""
    steps: list[Any] = []
    if how.logit_bias:
        steps.append(theirs.SequenceBiasLogitsProcessor({(token,): bias for token, bias in how.logit_bias.items()}))
    if how.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    steps.append(theirs.TemperatureLogitsWarper(float(how.temperature)))
    if how.top_k:
        steps.append(theirs.TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(how.top_p))
    if how.min_p:
        steps.append(theirs.MinPLogitsWarper(how.min_p))
    scores = torch.from_numpy(raw)[None].clone()
    for step in steps:
        scores = step(torch.tensor([seen]), scores)
    found: Array = scores.double().softmax(-1)[0].numpy()
    return found


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"logit_bias": {3: 5.0, 5: -100.0, 8: -2.5}},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.7, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": {0: 1.5, 90: 7.0}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_distributions_equal_those_of_transformers(settings: dict[str, Any], seed: int) -> None:
    how = Sampling(**{"temperature": 1.0, **settings})
    raw, prompt, generated = logits(seed), [1, 3, 3, 60], [5, 8, 8]
    expected = oracle(how, raw, prompt + generated)
    found = distribution(how, raw, prompt, generated)
    assert (found > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 4.0])  # 1,024 tokens have too little for top-p, or enough
def test_top_p_of_a_large_vocabulary_equals_that_of_transformers(scale: float) -> None:
    raw, how = logits(9, scale, 6000), Sampling(temperature=1, top_p=0.9)
    expected = oracle(how, raw, [1])
    found = distribution(how, raw, [1], [])
    assert ((found > 0).sum() > 1024) == (scale == 1)
    assert ((found > 0) != (expected > 0)).sum() <= 1  # float32 sums of thousands of numbers there
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3 * expected.max())


def test_equal_logits_at_the_bound_of_top_k_all_stay_as_in_transformers() -> None:
    raw = np.zeros(VOCABULARY, np.float32)
    raw[:10] = 1
    how = Sampling(temperature=1, top_k=4)
    np.testing.assert_allclose(distribution(how, raw, [0], []), oracle(how, raw, [0]), rtol=1e-6)


def test_presence_and_frequency_penalties_mean_what_openai_says() -> None:
    how = Sampling(presence_penalty=0.5, frequency_penalty=-0.25)
    raw = logits(1)
    sampler = Sampler(how, [9, 9])
    sampler._counts = Counter([4, 4, 4, 7])
    expected = raw.copy()
    expected[4] -= 3 * -0.25 + 0.5
    expected[7] -= 1 * -0.25 + 0.5
    np.testing.assert_allclose(sampler._adjusted(raw), expected, rtol=1e-6)


def test_greedy_is_the_default_and_takes_the_first_of_equals() -> None:
    raw = logits(2)
    raw[[40, 50]] = raw.max() + 1
    assert Sampling().temperature == 0
    assert Sampler(Sampling(), [1]).choose(raw).id == 40
    assert Sampler(Sampling(logit_bias={50: 0.1}), [1]).choose(raw).id == 50
    assert Sampler(Sampling(repetition_penalty=1.5), [40]).choose(raw).id == 50


def test_log_probabilities_are_those_of_the_model() -> None:
    raw = logits(3)
    token = Sampler(Sampling(temperature=3, logit_bias={5: 50.0}, logprobs=6), [1]).choose(raw)
    expected = torch.from_numpy(raw).double().log_softmax(-1)
    assert token.id == 5
    assert token.logprob == pytest.approx(expected[5].item(), abs=1e-5)
    values, tokens = expected.topk(6)
    assert [each for each, _ in token.top] == tokens.tolist()
    assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_taken_together_give_what_each_gives_alone(dtype: type[Any]) -> None:
    rows = np.stack([logits(seed) for seed in range(5)]).astype(dtype)
    rows[3, 7] = np.nan
    for place, (row, peak) in enumerate(zip(rows, peaks(rows), strict=True)):
        together, alone = (Sampler(Sampling(logprobs=2), [1]) for _ in range(2))
        if place == 3:
            with pytest.raises(RunError, match="finite"):
                together.choose(row, peak)
        else:
            assert together.choose(row, peak) == alone.choose(row)


def test_top_log_probabilities_of_equal_logits_are_the_first_tokens() -> None:
    token = Sampler(Sampling(logprobs=3), [1]).choose(np.zeros(VOCABULARY, np.float16))
    assert [each for each, _ in token.top] == [0, 1, 2]
    assert token.logprob == pytest.approx(-math.log(VOCABULARY))


def test_draws_follow_the_distribution() -> None:
    raw = np.log(np.array([0.5, 0.3, 0.15, 0.05, 1e-9])).astype(np.float32)
    sampler = Sampler(Sampling(temperature=1, seed=5), [0])
    found = Counter(sampler.choose(raw).id for _ in range(4000))
    for token, share in enumerate([0.5, 0.3, 0.15, 0.05]):
        assert found[token] / 4000 == pytest.approx(share, abs=0.03)


def test_a_seed_gives_the_same_tokens_and_choices_differ() -> None:
    def draw(seed: int | None, choice: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed), [0], choice)
        return [sampler.choose(np.zeros(VOCABULARY, np.float32)).id for _ in range(12)]

    assert draw(7, 0) == draw(7, 0)
    assert len({tuple(draw(seed, choice)) for seed in (7, -8, 2**64 - 1) for choice in range(3)}) == 9
    assert draw(None, 0) != draw(None, 0)


def test_sampling_leaves_the_logits_as_they_are() -> None:
    raw = logits(4)
    before = raw.copy()
    sampler = Sampler(Sampling(temperature=1, top_k=5, presence_penalty=1, repetition_penalty=2), [1, 2])
    for _ in range(3):
        sampler.choose(raw)
    np.testing.assert_array_equal(raw, before)


def test_a_tiny_temperature_is_greedy() -> None:
    raw = logits(5, scale=1e4)
    assert Sampler(Sampling(temperature=1e-300), [1]).choose(raw).id == raw.argmax()


def test_an_impossible_token_is_never_drawn() -> None:
    raw = np.full(VOCABULARY, -np.inf, np.float32)
    raw[[5, 60]] = 0
    sampler = Sampler(Sampling(temperature=1, top_p=0.99), [1])
    assert {sampler.choose(raw).id for _ in range(50)} == {5, 60}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    raw = logits(6)
    raw[3] = value
    with pytest.raises(RunError, match="finite logits"):
        Sampler(Sampling(), [1]).choose(raw)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"min_p": True},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": [1]},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"1": 1.0}},
        {"stop_strings": "end"},
        {"stop_strings": [""]},
        {"stop_strings": [1]},
        {"stop_tokens": [-1]},
        {"stop_tokens": 5},
        {"seed": 1 << 64},
        {"seed": 0.5},
        {"n": 0},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_a_bad_value_is_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))) as caught:
        Sampling(**settings)
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    Sampling(stop_tokens=[9], logit_bias={9: 1.0}).check(10)
    for how in (Sampling(stop_tokens=[10]), Sampling(logit_bias={10: 1.0})):
        with pytest.raises(InputError, match="from 0 to 9"):
            how.check(10)


class Alternating:
    """Allows tokens by turns, and none behind the sixth."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> Array:
        return np.equal(np.arange(6) % 2, len(self.accepted) % 2)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_a_constraint_bounds_the_tokens_and_learns_those_chosen(how: dict[str, Any]) -> None:
    constraint = Alternating()
    sampler = Sampler(Sampling(**how, logit_bias={7: 50}), [1], constraint=constraint)
    logits = np.random.default_rng(0).standard_normal((20, 9)).astype(np.float32)
    tokens = [sampler.choose(row) for row in logits]
    assert [token.id % 2 for token in tokens] == [0, 1] * 10
    assert max(token.id for token in tokens) < 6
    assert constraint.accepted == [token.id for token in tokens]
    assert tokens[0].logprob == pytest.approx(
        Sampler(Sampling(logit_bias={tokens[0].id: 100}), [1]).choose(logits[0]).logprob
    )


def test_a_constraint_that_allows_nothing_fails() -> None:
    constraint = Alternating()
    constraint.allowed = lambda: np.zeros(6, bool)  # type: ignore[method-assign]
    with pytest.raises(RunError, match="a token that the constraint allows"):
        Sampler(Sampling(), [1], constraint=constraint).choose(np.zeros(9, np.float32))


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-30, 1, 1e300])
@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1, 1e300])
def test_extreme_numbers_sample_a_token(temperature: float, penalty: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty, top_p=0.9, logprobs=2), [1, 2])
    raw = np.array([0, 3, -2, 1e4, -1e4], np.float32)
    found = {sampler.choose(raw).id for _ in range(5)}
    assert found <= set(range(5))
    if temperature < 1 and penalty <= 1:
        assert found == ({1} if penalty < 1 else {3})
