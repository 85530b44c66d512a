"""Texts and digests of documents are what the json module has them be."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tpeft_deploy.bundle import canonical_json

floats = st.floats(allow_nan=False, allow_infinity=False)
small = st.builds(lambda value, power: value * 10.0**power, st.floats(-1, 1), st.integers(-12, 24))
plain = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | floats
    | small
    | plain
    | st.sampled_from(["1e-7, ", ": 0.00001]", "12e4"]),
    lambda inner: st.lists(inner) | st.dictionaries(plain, inner),
)


@given(st.dictionaries(plain, values))
@example({"a": 1e-5, "b": [1e16, -1.5e-7, 10.00001, -0.0, 0.0001, 2.0**63, 5e-324], "1e-5": "0.00001"})
@example({"a": {}, "b": [[]], "": ""})
def test_the_quick_text_is_what_json_writes(document: dict[str, Any]) -> None:
    assert canonical_json._quick_text(document) == json.dumps(document, sort_keys=True)


@pytest.mark.parametrize("power", range(64))
def test_floats_of_all_sizes_are_written_as_json_does(power: int) -> None:
    bits = ((power * 32 + 1 + step) << 52 | (0x9E3779B97F4A7C15 * (step + 1)) & (2**52 - 1) for step in range(31))
    numbers = [struct.unpack("d", struct.pack("Q", own & (2**64 - 1)))[0] for own in bits]
    document = {"numbers": [own for own in numbers if math.isfinite(own)]}
    assert canonical_json._quick_text(document) == json.dumps(document)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"a": "\x7f"}',
        '{"a": "é"}',
        '{"a": "\\"1e-7,"}',
        '{"a": "\\u0000"}',
    ],
)
def test_what_msgspec_writes_otherwise_is_left_to_json(text: str) -> None:
    document, quick = canonical_json.decode(text)
    assert not quick
    assert json.dumps(document) == json.dumps(json.loads(text))


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', '{"a": 01}', '{"a": "\n"}', "\ufeff{}", "{} {}", '{"a"}'])
def test_errors_are_those_of_json(text: str) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        canonical_json.decode(text)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("text", ['{"b": 1, "a": 2, "b": 3e-7}', '{"b": 12345678901234567890123, "a": 1e16}', "[1]"])
def test_documents_are_those_of_json(text: str) -> None:
    document, quick = canonical_json.decode(text)
    assert quick
    assert repr(document) == repr(json.loads(text))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("stated", ["right", "wrong", None])
def test_a_digest_is_of_all_other_fields(quick: bool, stated: str | None) -> None:
    fields = {"b": 1e-7, "a": ["x"]}
    expected = hashlib.sha256(b'{"a": ["x"], "b": 1e-07}').hexdigest()
    document = fields if stated is None else fields | {"digest": expected if stated == "right" else "0" * 64}
    assert canonical_json.digest(document, quick=quick) == expected
