"""Choice of the next token: logits of one row in, a token and log-probabilities out."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from tpeft_deploy.errors import InputError, RunError
from tpeft_deploy.runtime.generation.probabilities import filtered
from tpeft_deploy.tucker import Array

__all__ = [
    "Constraint",
    "Peak",
    "Sampler",
    "Sampling",
    "Token",
    "most_probable",
    "peaks",
]

T = TypeVar("T")

_WORD = (1 << 64) - 1
_MOST_CHOICES = 128
_MOST_TOP = 128
_LARGEST_PENALTY = 1e8  # this keeps float32 from overflow, as its inverse does
_AHEAD = 16  # positions the random numbers of which are made together


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a sequence are chosen; greedy unless a temperature is given.

    The logits are changed in the order of transformers: logit bias, repetition penalty, [frequency and presence
    penalty, which transformers does not have], temperature, top-k, top-p, min-p.  Log-probabilities are those of the
    model, before any of these.

    Attributes:
        temperature: divisor of the logits; 0 chooses the most probable token.
        top_k: number of most probable tokens to choose from; 0 is no bound.
        top_p: probability mass of the most probable tokens to choose from.
        min_p: smallest probability to choose, relative to the most probable token's.
        repetition_penalty: divisor of positive logits and factor of negative ones, for all tokens of the prompt and
            those generated.
        presence_penalty: amount subtracted from the logit of each generated token, once (as in OpenAI's API).
        frequency_penalty: amount subtracted from the logit of a token for each time it was generated.
        logit_bias: token -> amount added to the logit.
        stop_tokens: tokens that end a sequence; the one that does is the last of the sequence, as in transformers.
        stop_strings: texts that end a sequence, and are not part of its text.
        seed: seed of the random numbers; those of a position depend on the seed and the position alone.  None draws a
            seed for each sequence.
        n: number of sequences for one prompt.
        logprobs: number of most probable tokens of which the log-probabilities are given.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int = 0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, math.inf, open_end=True)
        _whole("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1, open_start=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, open_start=True, open_end=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _whole("n", self.n, 1, _MOST_CHOICES)
        _whole("logprobs", self.logprobs, 0, _MOST_TOP)
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), _WORD)
        if not isinstance(self.logit_bias, Mapping):
            raise _bad("logit_bias", "a dict of token to number", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _whole("a token of logit_bias", token, 0)
            _number("a value of logit_bias", bias, -math.inf, math.inf, open_start=True, open_end=True)
        strings: tuple[object, ...] = _listed("stop_strings", self.stop_strings)
        if isinstance(self.stop_strings, str) or not all(isinstance(text, str) and text for text in strings):
            raise _bad("stop_strings", "a list of texts that are not empty", self.stop_strings)
        tokens = _listed("stop_tokens", self.stop_tokens)
        for token in tokens:
            _whole("a token of stop_tokens", token, 0)
        # Copies, so that what was checked stays as it is.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "stop_strings", strings)
        object.__setattr__(self, "stop_tokens", tokens)

    def check(self, vocabulary: int) -> None:
        """Refuse tokens that a model does not have.

        Raises:
            InputError: a token of `logit_bias` or `stop_tokens` is too large.
        """
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_tokens", self.stop_tokens)):
            for token in tokens:
                _whole(f"a token of {name}", token, 0, vocabulary - 1)


def _bad(name: str, expected: str, got: object) -> InputError:
    return InputError("set how tokens are sampled", expected=f"{name} to be {expected}", got=repr(got))


def _listed(name: str, values: Iterable[T]) -> tuple[T, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise _bad(name, "a list", values) from None


def _whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise _bad(name, f"a whole number from {least}" + ("" if most == math.inf else f" to {most}"), value)


def _number(
    name: str, value: object, least: float, most: float, *, open_start: bool = False, open_end: bool = False
) -> None:
    fine = False
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        above = value > least if open_start else value >= least
        below = value < most if open_end else value <= most
        fine = bool(above and below)
    if not fine:
        start = f"above {least}" if open_start else f"from {least}"
        end = "finite" if most == math.inf else f"below {most}" if open_end else f"at most {most}"
        raise _bad(name, "a finite number" if least == -math.inf else f"a number {start} and {end}", value)


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: number of the token in the vocabulary.
        logprob: log-probability that the model gave it.
        top: the most probable tokens and their log-probabilities, the most probable first.
        text: text that is settled with this token; empty without a detokeniser.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""


class Peak(NamedTuple):
    """What every choice needs of the logits of a row.

    Attributes:
        token: most probable token.
        logit: its logit.
        norm: logarithm of the sum of the exponentials of all logits; NaN where no log-probability is wanted.
    """

    token: int
    logit: float
    norm: float


def peaks(logits: Array, scored: bool = True) -> list[Peak]:
    """Find the peaks of rows together: behind a run, which leaves caches cold, every call costs more than its numbers.

    Args:
        logits: array (n, vocabulary).
        scored: whether log-probabilities are wanted.
    """
    raw = np.asarray(logits, np.float32)
    best = raw.argmax(-1).tolist()
    highest = [float(row[token]) for row, token in zip(raw, best, strict=True)]
    norms = _norms(raw, highest) if scored else [math.nan] * len(best)
    return [Peak(*row) for row in zip(best, highest, norms, strict=True)]


def _norms(raw: Array, highest: list[float]) -> list[float]:
    with np.errstate(invalid="ignore"):  # a row that is not finite has no choice
        sums = np.exp(raw - np.array(highest, np.float32)[:, None]).sum(-1, dtype=np.float64).tolist()
    return [peak + math.log(total) for peak, total in zip(highest, sums, strict=True)]


class Constraint(Protocol):
    """Which tokens may follow in one sequence, such as those of a grammar."""

    def allowed(self) -> Array:
        """Return which tokens may be next, as an array of bool; those behind its end may not."""

    def accept(self, token: int) -> None:
        """Take in a token that was chosen; one of the sequence's stop tokens may be."""


class Sampler:
    """Chooses the tokens of one sequence; equal arguments and logits give equal tokens, whatever runs beside it.

    Args:
        sampling: how.
        prompt: tokens of the prompt.
        choice: index of the sequence among the `n` of one prompt; each has random numbers independent of the others'.
        constraint: bound of the tokens.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], choice: int = 0, constraint: Constraint | None = None
    ) -> None:
        self.sampling = sampling
        self._constraint = constraint
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed & _WORD
        self._key = np.array([seed, choice], np.uint64)
        self._position = 0
        self._first, self._numbers = 0, list[float]()  # random numbers of positions, and the first of these
        self._counts: Counter[int] = Counter()
        self._prompt = np.unique(np.asarray(prompt, np.int64)) if sampling.repetition_penalty != 1 else None
        self._biased = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        amounts = (len(self._biased), sampling.frequency_penalty, sampling.presence_penalty)
        self._adjusts = any(amounts) or self._prompt is not None

    def choose(self, logits: Array, peak: Peak | None = None) -> Token:
        """Choose the next token, and take it into account from then on.

        Args:
            logits: one number per token of the vocabulary, of any float dtype; stays unchanged.
            peak: peak of the logits, if it is known.

        Raises:
            RunError: the logits have NaN, or allow no token.
        """
        raw = np.asarray(logits, np.float32)
        best, highest, norm = peaks(raw[None])[0] if peak is None else peak
        if not math.isfinite(highest):
            raise RunError("sample a token", expected="finite logits", got=f"a largest logit of {highest}")
        scores = self._bounded(self._adjusted(raw))
        if self.sampling.temperature == 0:
            token = best if scores is raw else int(scores.argmax())
        else:
            token = self.draw(*filtered(scores, self.sampling))
        self.accept(token)
        return Token(token, float(raw[token]) - norm, most_probable(raw, self.sampling.logprobs, norm))

    def accept(self, token: int) -> None:
        """Take a token into account that was chosen."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._counts[token] += 1
        self._position += 1

    @property
    def adjusts(self) -> bool:
        """Whether the choice is not made of the logits as they are: with a bias, penalties or a constraint."""
        return self._adjusts or self._constraint is not None

    def random(self) -> float:
        """Return the random number of this position, the same at each call."""
        index = self._position - self._first
        if not 0 <= index < len(self._numbers):
            # A counter gives four numbers, the first of which is the position's; the next counter follows.
            generator = np.random.Generator(np.random.Philox(counter=[self._position, 0, 0, 0], key=self._key))
            self._numbers, self._first, index = generator.random(4 * _AHEAD)[::4].tolist(), self._position, 0
        return self._numbers[index]

    def _adjusted(self, raw: Array) -> Array:
        """Logits with the bias and the penalties; the same array where there are none."""
        how = self.sampling
        if not self._adjusts:
            return raw
        scores = raw.copy()
        scores[self._biased] += self._bias
        generated = np.fromiter(self._counts, np.int64, len(self._counts))
        if self._prompt is not None:
            seen = np.union1d(self._prompt, generated)
            penalty = np.float32(min(max(how.repetition_penalty, 1 / _LARGEST_PENALTY), _LARGEST_PENALTY))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if how.frequency_penalty or how.presence_penalty:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            scores[generated] -= counts * np.float32(how.frequency_penalty) + np.float32(how.presence_penalty)
        return scores

    def _bounded(self, scores: Array) -> Array:
        """Scores without the tokens that the constraint forbids; the same array where there is none."""
        if self._constraint is None:
            return scores
        allowed = self._constraint.allowed()[: len(scores)]
        found = np.full_like(scores, -np.inf)
        found[: len(allowed)][allowed] = scores[: len(allowed)][allowed]
        if found.max() == -math.inf:
            raise RunError("sample a token", expected="a token that the constraint allows", got="none")
        return found

    def draw(self, tokens: Array, probabilities: Array) -> int:
        """Draw one of the tokens, with the random number of this position."""
        cumulative = probabilities.cumsum()
        # The right side is never that of a token without probability, except behind the end.
        index = int(cumulative.searchsorted(self.random() * cumulative[-1], side="right"))
        if index == len(cumulative):
            index = int(np.flatnonzero(probabilities > 0)[-1])
        return int(tokens[index])


def most_probable(raw: Array, number: int, norm: float) -> tuple[tuple[int, float], ...]:
    """The most probable tokens of a row and their log-probabilities; among equals, the smaller tokens first.

    Args:
        raw: logits.
        number: how many.
        norm: logarithm of the sum of the exponentials of all logits of the row.
    """
    number = min(number, len(raw))
    if not number:
        return ()
    # Among equals at the bound, the smaller tokens.
    found = np.flatnonzero(raw >= np.partition(raw, -number)[-number])
    order = np.argsort(-raw[found], kind="stable")[:number]
    return tuple((int(token), float(raw[token]) - norm) for token in found[order])
