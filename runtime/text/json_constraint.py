"""Constraint of generated text to JSON of a schema, with llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tpeft_deploy.errors import InputError, RunError, requires
from tpeft_deploy.tucker import Array

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["JsonConstraint", "grammar_tokenizer", "json_constraint"]

_EXTRA = "structured"
_SHOWN = 200
_LARGEST = 32 * 1024  # characters of a schema; larger ones take seconds to compile


class JsonConstraint:
    """Tokens that may follow in one sequence; see `sampling.Constraint`.

    Args:
        matcher: state of the grammar, for this sequence only.
        vocabulary: number of tokens of the tokenizer.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Array:
        """Return which tokens may be next, as an array of bool; those behind its end may not."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)

    def accept(self, token: int) -> None:
        """Take in a token that was chosen.

        Raises:
            RunError: the grammar is beyond the limits of llguidance.
        """
        if not self._matcher.consume_token(token):
            raise RunError("generate JSON", problem=self._matcher.get_error()[:_SHOWN] or "the grammar has ended")


def grammar_tokenizer(tokenizer: str, stops: Sequence[int]) -> LLTokenizer:
    """Return a tokenizer as grammars need it.

    Args:
        tokenizer: text of tokenizer.json.
        stops: tokens that end a text.

    Raises:
        MissingExtra: llguidance is not installed.
        InputError: no token ends a text.
    """
    with requires("llguidance", _EXTRA, "generate JSON"):
        from llguidance import LLTokenizer
    if not stops:
        raise InputError("generate JSON", expected="a model with a stop token", got="one without")
    return LLTokenizer(tokenizer, eos_token=list(stops))


def json_constraint(tokenizer: LLTokenizer, schema: Mapping[str, object]) -> Callable[[], JsonConstraint]:
    """Return a function that makes the constraint of a sequence.

    Args:
        tokenizer: tokenizer of the model.
        schema: JSON schema.

    Raises:
        InputError: the schema is invalid, or has what llguidance does not support.
    """
    from llguidance import LLMatcher

    doing = "read a JSON schema"
    try:
        text = json.dumps(schema)
        if len(text) > _LARGEST:
            raise InputError(doing, expected=f"at most {_LARGEST:,} characters", got=f"{len(text):,}")
        # Without spaces of any number, which a model may repeat until its tokens are used up.
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        problem = LLMatcher.validate_grammar(grammar, tokenizer)
        matcher = LLMatcher(tokenizer, grammar)
    except (ValueError, TypeError, RecursionError) as error:
        raise _unusable(doing, str(error) or type(error).__name__) from error
    if problem or matcher.get_error():
        raise _unusable(doing, problem or matcher.get_error())
    return lambda: JsonConstraint(matcher.deep_copy(), tokenizer.vocab_size)


def _unusable(doing: str, problem: str) -> InputError:
    return InputError(doing, problem=" ".join(problem.split())[:_SHOWN])
