"""Tokens of texts and text of tokens: those that completions and chats have."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.server.live import Live
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.text.model_text import ModelText

CHAT: Any = [{"role": "user", "content": "The quick </s> fox"}]


def ask(live: Live, path: str, **body: Any) -> Any:
    answer = live.ask("POST", f"/v1/{path}", "acme", "infer", json={"model": "a", **body})
    return answer.json() if answer.status_code == 200 else answer.json()["error"]


def test_tokens_are_those_of_prompts_and_chats(live: Live, talking: Bundle) -> None:
    text = ModelText.open(talking)
    tokens = text.encode("fox 🦊", literal=True)
    found = ask(live, "tokenize", prompt="fox 🦊", return_token_strs=True)
    assert found == {
        "count": len(tokens),
        "tokens": tokens,
        "token_strs": [text.name(token) for token in tokens],
        "max_model_len": live.served.runtime.most_tokens,
    }
    assert ask(live, "detokenize", tokens=tokens)["prompt"] == text.decode(tokens, special=True) == "<s>fox 🦊"
    bare = ask(live, "tokenize", prompt="fox", add_special_tokens=False)
    assert (bare["tokens"], bare["token_strs"]) == (text.encode("fox", special=False), None)
    long = "fox </s> " * 1000
    assert ask(live, "tokenize", prompt=long)["tokens"] == text.encode(long, literal=True)
    assert ask(live, "tokenize", prompt=long, parse_special=True)["tokens"] == text.encode(long)
    assert ask(live, "tokenize", messages=CHAT)["tokens"] == text.chat(CHAT, literal=True)
    whole = ask(live, "tokenize", messages=CHAT, add_generation_prompt=False, parse_special=True)
    assert whole["tokens"] == text.chat(CHAT, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
        ("tokenize", {"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"messages": CHAT, "chat_template": "x"}, "chat_template"),
        ("detokenize", {"tokens": [1, 400000]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [1], "model": "nobody"}, "model"),
    ],
)
def test_what_is_no_text_is_refused_by_name(live: Live, path: str, body: dict[str, Any], param: str) -> None:
    error = ask(live, path, **body)
    assert error["param"] == param, error
