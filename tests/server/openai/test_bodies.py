from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.server.openai.bodies import CompletionBody
from tpeft_deploy.runtime.server.openai.chat_body import ChatBody


def chat(**fields: Any) -> ChatBody:
    return msgspec.convert({"model": "a", "messages": [], **fields}, ChatBody)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_is_one_or_several(prompt: Any, prompts: Any) -> None:
    assert msgspec.convert({"model": "a", "prompt": prompt}, CompletionBody).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [1, "a"], [[1], "a"], [1, [1]], ["x"] * 65])
def test_prompts_of_several_types_or_too_many_are_refused(prompt: Any) -> None:
    with pytest.raises(InputError, match="read field 'prompt'"):
        _ = msgspec.convert({"model": "a", "prompt": prompt, "n": 2}, CompletionBody).prompts


def test_fields_that_ask_for_nothing_and_unknown_ones_are_ignored() -> None:
    chat(response_format={"type": "text"}, tool_choice="auto", modalities=["text"], ignore_eos=False, user="x").check()
    assert chat(stop="x", top_k=-1, logit_bias={"3": 1}).changes() == {
        **dict.fromkeys(("n", "seed", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")),
        **dict.fromkeys(("repetition_penalty", "logprobs")),
        "top_k": 0,
        "stop_strings": ["x"],
        "logit_bias": {3: 1},
    }


def test_biases_are_bounded() -> None:
    assert len(chat(logit_bias=dict.fromkeys(map(str, range(1024)), 1)).changes()["logit_bias"]) == 1024
    with pytest.raises(InputError, match="at most 1024 tokens, got 1025"):
        chat(logit_bias=dict.fromkeys(map(str, range(1025)), 1)).changes()


@pytest.mark.parametrize("name", ["messages", "literal", "template"])
def test_template_variables_replace_no_argument(name: str) -> None:
    with pytest.raises(InputError, match="chat_template_kwargs"):
        chat(chat_template_kwargs={name: "x"}).options()


@pytest.mark.parametrize("name", [*ChatBody.unlisted])
def test_fields_that_are_not_supported_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"read field '{name}'"):
        chat(**{name: "something"}).check()
