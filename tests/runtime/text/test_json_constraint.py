"""What a random model generates under a schema is JSON of that schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from tests.helpers.runtime.tokenizers_of_styles import fast
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.generation.sampling import Sampler
from tpeft_deploy.runtime.text.model_text import ModelText

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

END = 1
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "size": {"type": "integer", "minimum": -20, "maximum": 300},
            "tags": {"type": "array", "items": {"enum": ["red", "grün", "a \"b\""]}, "maxItems": 3},
            "on": {"type": ["boolean", "null"]},
        },
        "required": ["name", "size", "tags"],
        "additionalProperties": False,
    },
    "reference": {
        "$defs": {"point": {"type": "array", "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 9}] * 2,
                            "items": False, "minItems": 2}},
        "type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 3,
    },
    "choice": {"anyOf": [{"const": 3}, {"type": "string", "pattern": "^[a-f]{1,4}$"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> ModelText:
    tokenizer = fast("byte-level").backend_tokenizer.to_str()
    return ModelText(tokenizer, TextFacts(stop_tokens=(END,)))


def generated(text: ModelText, schema: dict[str, Any], seed: int, most: int = 400) -> tuple[str, bool]:
    """Text of tokens drawn from random logits, and whether it has ended."""
    sampler = Sampler(text.sampling(temperature=1.0, seed=seed), [5], constraint=text.constraint(schema)())
    draw, tokens = np.random.default_rng(seed), list[int]()
    while len(tokens) < most:
        # More logits than the tokenizer has tokens, as those of many models.
        tokens.append(sampler.choose(3 * draw.standard_normal(text.vocabulary + 7).astype(np.float32)).id)
        if tokens[-1] == END:
            return text.decode(tokens[:-1]), True
    return text.decode(tokens), False


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_is_valid(text: ModelText, name: str) -> None:
    found = set()
    for seed in range(12):
        made, ended = generated(text, SCHEMAS[name], seed)
        assert ended, made
        jsonschema_rs.validate(SCHEMAS[name], json.loads(made))
        found.add(made)
    assert len(found) > 3


def test_sequences_of_one_request_have_constraints_of_their_own(text: ModelText) -> None:
    make = text.constraint({"const": 7})
    one, other = make(), make()
    first = int(np.flatnonzero(one.allowed())[0])
    one.accept(first)
    assert np.flatnonzero(one.allowed()).tolist() == [END]
    assert np.flatnonzero(other.allowed()).tolist() == [first]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"properties": {"a": {"$ref": "#/none"}}, "type": "object"},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "pattern": "(?<=a)b"},
        {"type": "string", "pattern": "("},
        {"enum": list(range(10_000))},
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_one_line(text: ModelText, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="read a JSON schema") as caught:
        text.constraint(schema)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_stop_token_is_refused() -> None:
    text = ModelText(fast("byte-level").backend_tokenizer.to_str(), TextFacts())
    with pytest.raises(InputError, match="a model with a stop token"):
        text.constraint({})
