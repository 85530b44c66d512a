from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.helpers.runtime.tokenizers_of_styles import LINES, STYLES, fast, tokenizer
from tpeft_deploy.runtime.text.detokeniser import clean, detokenisers


def pieces(tokens: list[int], style: str, *, clean_up: bool = False, before: list[int] | None = None) -> list[str]:
    made = detokenisers(tokenizer(style), clean_up=clean_up)(before or [])
    return [*(made.push(token) for token in tokens), made.flush()]


@pytest.mark.parametrize("style", STYLES)
@given(st.data())
def test_the_texts_joined_are_what_transformers_decodes_of_any_tokens(style: str, data: st.DataObject) -> None:
    size = tokenizer(style).get_vocab_size() + 2  # a model may have more tokens than its tokenizer
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    assert "".join(pieces(tokens, style)) == fast(style).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("style", STYLES)
@given(text=st.text(max_size=20))
@example(text="🦊 naïve  日本語\n\n\tend ' . don't")
def test_so_they_are_for_texts(style: str, text: str) -> None:
    tokens = tokenizer(style).encode(text).ids
    assert "".join(pieces(tokens, style)) == fast(style).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("style", STYLES)
@given(st.data())
def test_a_text_that_continues_another_is_the_rest_of_both(style: str, data: st.DataObject) -> None:
    words = st.sampled_from([token for line in LINES[:3] for token in tokenizer(style).encode(line).ids])
    before, tokens = (data.draw(st.lists(words, min_size=size, max_size=8)) for size in (1, 0))
    decode = fast(style).decode
    whole, start = (decode(ids, skip_special_tokens=True) for ids in (before + tokens, before))
    if whole.startswith(start):  # not when the first ends within a character
        assert start + "".join(pieces(tokens, style, before=before)) == whole


@pytest.mark.parametrize("style", ["metaspace", "wordpiece", "plain"])
@given(st.data())
def test_spaces_before_punctuation_are_removed_as_transformers_does(style: str, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer(style).get_vocab_size() - 1), max_size=12))
    own = fast(style, clean_up_tokenization_spaces=True)
    assert "".join(pieces(tokens, style, clean_up=True)) == own.decode(tokens, skip_special_tokens=True)


class _Characters:
    """Detokeniser whose tokens are characters."""

    push = staticmethod(chr)

    def flush(self) -> str:
        return ""


@given(st.text(alphabet=" '.,?!nmtsvrea", max_size=16))
def test_so_it_does_wherever_the_text_is_cut(text: str) -> None:
    from tpeft_deploy.runtime.text.detokeniser import _CleanUp

    made = _CleanUp(_Characters())
    assert "".join([*(made.push(ord(c)) for c in text), made.flush()]) == clean(text)


def test_a_character_comes_with_its_last_byte() -> None:
    tokens = tokenizer("byte-level").encode("€uro", add_special_tokens=False).ids
    texts = pieces(tokens, "byte-level")
    assert "".join(texts) == "€uro"
    assert texts[:2] == ["", ""]
    assert not any("�" in text for text in texts)


def test_most_texts_come_at_once() -> None:
    for style in STYLES:
        texts = pieces(tokenizer(style).encode(LINES[0]).ids, style)
        assert not texts[-1]
        assert sum(map(bool, texts)) >= len(texts) - 3


def test_a_decoder_of_another_kind_is_not_asked_before_the_end() -> None:
    document = json.loads(tokenizer("metaspace").to_str())
    strip = {"type": "Strip", "content": "d", "start": 0, "stop": 2}
    document["decoder"] = {"type": "Sequence", "decoders": [document["decoder"], {"type": "Fuse"}, strip]}
    own = Tokenizer.from_str(json.dumps(document))
    tokens = own.encode("quick fox and").ids
    made = detokenisers(own)([])
    assert [made.push(token) for token in tokens] == [""] * len(tokens)
    assert made.flush() == own.decode(tokens) == "quick fox an"


@pytest.mark.parametrize("style", STYLES)
@given(st.data())
def test_special_tokens_that_are_shown_stand_between_the_texts_around_them(style: str, data: st.DataObject) -> None:
    own = tokenizer(style)
    tokens = data.draw(
        st.lists(st.sampled_from([0, 2, *own.encode(LINES[0]).ids, *own.encode(LINES[1]).ids]), max_size=12)
    )
    made = detokenisers(own)((), shown=["<|user|>", "<tool>", "unknown"])
    found = "".join([*(made.push(token) for token in tokens), made.flush()])
    assert found.count("<|user|>") == tokens.count(2)
    assert "<s>" not in found
    ends = [at for at, token in enumerate([*tokens, 2]) if token == 2]
    assert found.split("<|user|>")[0] == fast(style).decode(tokens[: ends[0]], skip_special_tokens=True)
    if style != "byte-level":
        return
    parts = [tokens[start:end] for start, end in zip([0, *(at + 1 for at in ends)], ends, strict=False)]
    assert found.split("<|user|>") == [fast(style).decode(part, skip_special_tokens=True) for part in parts]
