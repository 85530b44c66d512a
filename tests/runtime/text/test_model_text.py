from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.runtime.chat_templates import TEMPLATES
from tests.helpers.runtime.tokenizers_of_styles import LINES, STYLES, fast, tokenizer
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.errors import InputError, IntegrityError
from tpeft_deploy.runtime.generation.sampling import Sampling
from tpeft_deploy.runtime.text.model_text import ModelText

CHAT = [{"role": "user", "content": "The fox said </s> hi"}]
SPECIAL: Any = {"bos_token": "<s>", "eos_token": "</s>"}


def text(style: str = "byte-level", **facts: Any) -> ModelText:
    return ModelText(tokenizer(style).to_str(), TextFacts(**facts))


@pytest.mark.parametrize("style", STYLES)
@given(st.text(max_size=20))
def test_it_encodes_and_decodes_as_transformers(style: str, given: str) -> None:
    own, oracle = text(style), fast(style)
    for special in (True, False):
        assert own.encode(given, special=special) == oracle.encode(given, add_special_tokens=special)
    tokens = own.encode(given)
    assert own.decode(tokens) == oracle.decode(tokens, skip_special_tokens=True)
    assert own.decode(tokens, special=True) == oracle.decode(tokens)


def test_a_chat_gives_the_tokens_of_apply_chat_template() -> None:
    source = TEMPLATES["mistral"]
    own = text(templates={"default": source}, special_tokens=SPECIAL)
    oracle = fast("byte-level").apply_chat_template(CHAT, chat_template=source, return_dict=False)
    assert own.chat(CHAT) == oracle
    assert own.has_chat


def test_a_template_is_chosen_by_name_and_by_tools() -> None:
    own = text(templates={"default": "plain", "tool_use": "tools {{ tools | length }}", "rag": "{{ documents[0] }}"})
    assert own.render(CHAT) == "plain"
    assert own.render(CHAT, tools=[{}]) == "tools 1"
    assert own.render(CHAT, template="rag", documents=["d"]) == "d"
    with pytest.raises(InputError, match="one of the chat templates default, rag, tool_use"):
        own.render(CHAT, template="other")
    with pytest.raises(InputError, match=r"there are none.*Give a prompt in place of a chat"):
        text().render(CHAT)


def test_the_models_defaults_are_sampled_with_unless_changed() -> None:
    own = text(sampling={"temperature": 0.6, "top_p": 0.9}, stop_tokens=(1,))
    assert own.sampling() == Sampling(temperature=0.6, top_p=0.9, stop_tokens=[1])
    assert own.sampling(temperature=0.0, seed=None, stop_tokens=[2]) == Sampling(top_p=0.9, stop_tokens=[2])
    with pytest.raises(InputError, match="temperature"):
        own.sampling(temperature=-1)


def test_a_detokeniser_continues_a_prompt_or_begins_anew() -> None:
    own = text("byte-fallback")
    prompt, rest = own.encode("The quick"), own.encode("brown", special=False)
    for before, wanted in ((prompt, " brown"), ([], "brown")):
        made = own.detokeniser(before)()
        assert "".join([*(made.push(token) for token in rest), made.flush()]) == wanted


def test_texts_are_cut_and_padded_by_none_of_the_tokenizers_settings() -> None:
    own = tokenizer("byte-level")
    own.enable_truncation(3)
    own.enable_padding(length=64)
    try:
        made = ModelText(own.to_str(), TextFacts())
    finally:
        own.no_truncation()
        own.no_padding()
    assert made.encode(LINES[0]) == own.encode(LINES[0]).ids
    assert made.vocabulary == own.get_vocab_size()


def test_what_is_no_text_or_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="expected text"):
        text().encode(3)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="read the tokenizer of the model"):
        ModelText("{}", TextFacts())


@pytest.mark.parametrize("style", STYLES)
def test_names_of_special_tokens_are_text_if_taken_literally(style: str) -> None:
    own = text(style, templates={"default": "<|user|>{% for m in messages %}{{ m.content }}{% endfor %}</s>"})
    assert own.encode("a </s> b")[2:].count(1) == 1
    for written in ("a </s> b", "<|user|></s></s>", "\ufdd0</s>"):
        assert not {1, 2} & set(own.encode(written, literal=True))
        tokens = own.chat([{"role": "user", "content": written}], literal=True)
        assert [token for token in tokens if token in (1, 2)] == [2, 1] == [tokens[0], tokens[-1]]
    for line in LINES[:3]:
        assert own.encode(line, literal=True) == own.encode(line)
        chat = [{"role": "user", "content": line}]
        assert own.chat(chat, literal=True) == own.chat(chat)


@pytest.mark.parametrize("style", ["byte-level", "metaspace", "byte-fallback", "gemma"])
def test_the_bytes_of_tokens_are_those_of_their_text(style: str) -> None:
    own = text(style)
    tokens = own.encode(LINES[0] + LINES[1], special=False)
    joined = b"".join(map(own.token_bytes, tokens))
    assert joined.decode(errors="replace").split() == own.decode(tokens, special=True).split()
    assert own.token_bytes(1) == b"</s>"
