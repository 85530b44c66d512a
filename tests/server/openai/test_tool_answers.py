"""Tool calls over a live server, with the `openai` package: the model says what a script or a grammar allows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openai
import pytest

from tests.helpers.server.live import Live
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.operations.generation import Generations
from tpeft_deploy.runtime.text.model_text import ModelText
from tpeft_deploy.runtime.text.tool_format import ToolFormat, tool_format
from tpeft_deploy.tucker import Array

CHAT: Any = [{"role": "user", "content": "Weather?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Kiel"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "look", "parameters": CITY}},
    {"type": "function", "function": {"name": "wait"}},
]
CALLED = '<tool_call>\n{"name": "look", "arguments": {"city": "Ulm"}}\n</tool_call>'
SAID = f'I look.\n{CALLED}\n<tool_call>{{"name": "wait"}}</tool_call>'
CALLS = [("look", {"city": "Ulm"}), ("wait", {})]
Say = Callable[..., None]


class Script:
    """Constraint that allows one token at each place."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def allowed(self) -> Array:
        allowed: Array = np.arange(402) == self._tokens[0]
        return allowed

    def accept(self, token: int) -> None:
        assert token == self._tokens.pop(0)


@pytest.fixture(scope="module")
def text(talking: Bundle) -> ModelText:
    return ModelText.open(talking)


@pytest.fixture
def client(live: Live) -> Any:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys["acme", "infer"], max_retries=0) as found:
        yield found


@pytest.fixture
def say(text: ModelText, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Make the model say a text, and then its stop token."""

    def script(said: str, form: ToolFormat | None = None) -> None:
        tokens = [*text.encode(said, special=False), text.facts.stop_tokens[0]]
        monkeypatch.setattr(Generations, "constraint", lambda *_: lambda: Script(tokens))
        if form is not None:
            monkeypatch.setattr(ModelText, "tool_format", property(lambda _: form))

    return script


def whole(client: openai.OpenAI, **how: Any) -> list[tuple[str | None, list[Any], str]]:
    """Content, calls and reason of each choice."""
    answer = client.chat.completions.create(
        **{"model": "a", "messages": CHAT, "tools": TOOLS, "max_tokens": 200, **how}
    )
    found = []
    for choice in answer.choices:
        calls: Any = choice.message.tool_calls or []
        assert all(re.fullmatch("call_[A-Za-z0-9]{24}", call.id) and call.type == "function" for call in calls)
        assert len({call.id for call in calls}) == len(calls)
        read = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        found.append((choice.message.content, read, choice.finish_reason))
    return found


def streamed(client: openai.OpenAI, **how: Any) -> list[tuple[str | None, list[Any], str | None]]:
    """The same of a stream."""
    known: Any = {"model": "a", "messages": CHAT, "tools": TOOLS, "max_tokens": 200, **how}
    size = how.get("n", 1)
    content, calls, reasons = [""] * size, [dict[int, Any]() for _ in range(size)], [None] * size
    for chunk in client.chat.completions.create(**known, stream=True):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            content[choice.index] += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                own = calls[choice.index]
                if part.index not in own:
                    assert (part.type, part.function.arguments, part.index) == ("function", "", len(own))
                    assert re.fullmatch("call_[A-Za-z0-9]{24}", part.id)
                    own[part.index] = [part.function.name, ""]
                else:
                    assert part.id is part.function.name is None
                    own[part.index][1] += part.function.arguments
            reasons[choice.index] = choice.finish_reason
    read = [[(name, json.loads(arguments)) for name, arguments in own.values()] for own in calls]
    return [
        (text or (None if own else ""), own, reason) for text, own, reason in zip(content, read, reasons, strict=True)
    ]


def both(client: openai.OpenAI, **how: Any) -> list[tuple[str | None, list[Any], str]]:
    found = whole(client, **how)
    assert streamed(client, **how) == found
    return found


def test_calls_are_found_whole_and_in_streams(client: openai.OpenAI, say: Say) -> None:
    say(SAID)
    assert both(client) == [("I look.\n", CALLS, "tool_calls")]
    assert both(client, parallel_tool_calls=False) == [("I look.\n", CALLS[:1], "tool_calls")]
    assert both(client, n=3) == [("I look.\n", CALLS, "tool_calls")] * 3
    say(SAID.removeprefix("I look."))
    assert both(client) == [(None, CALLS, "tool_calls")]


def test_other_answers_are_text(client: openai.OpenAI, say: Say) -> None:
    say(SAID)
    others: list[Any] = [{"tool_choice": "none"}, {"tools": openai.omit}, {"tools": []}]
    for how in others:
        assert both(client, **how) == [(SAID, [], "stop")]
    for said in ("Fine <tool", '<tool_call>{"name": "nobody"}</tool_call>', '<tool_call>{"name": "look"', "", " "):
        say(said)
        assert both(client) == [(said, [], "stop")]
    say(SAID)
    cut = both(client, max_tokens=20)
    assert cut[0][1:] == ([], "length")
    assert SAID.startswith(cut[0][0] or "?")


def test_an_unknown_format_is_text(client: openai.OpenAI, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    say(SAID)
    monkeypatch.setattr(ModelText, "tool_format", property(lambda _: None))
    assert both(client) == [(SAID, [], "stop")]


def test_usage_and_log_probabilities_are_those_of_the_tokens(client: openai.OpenAI, say: Say, text: ModelText) -> None:
    say(SAID)
    known: Any = {
        "model": "a",
        "messages": CHAT,
        "tools": TOOLS,
        "max_tokens": 200,
        "logprobs": True,
        "top_logprobs": 1,
    }
    answer = client.chat.completions.create(**known)
    tokens = text.encode(SAID, special=False)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokens) + 1
    probabilities: Any = answer.choices[0].logprobs
    assert "".join(own.token for own in probabilities.content) == SAID
    found = []
    chunks = list(client.chat.completions.create(**known, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        if chunk.choices[0].logprobs is not None:
            found += chunk.choices[0].logprobs.content
    assert found == probabilities.content
    assert chunks[-1].usage == answer.usage


def test_a_special_token_may_be_the_marker(client: openai.OpenAI, say: Say, text: ModelText) -> None:
    said = 'So<|user|>{"name": "wait"}'
    say(said, ToolFormat("own", "<|user|>", tokens=("<|user|>",)))
    assert text.encode("<|user|>", special=False)[0] == 2
    assert both(client) == [("So", [("wait", {})], "tool_calls")]
    assert both(client, tool_choice="none") == [(said.replace("<|user|>", ""), [], "stop")]


def test_ids_are_short_where_the_template_takes_no_others(client: openai.OpenAI, say: Say) -> None:
    say('[TOOL_CALLS][{"name": "wait", "arguments": {}}]', tool_format("[TOOL_CALLS]"))
    answer = client.chat.completions.create(model="a", messages=CHAT, tools=TOOLS)
    [call] = answer.choices[0].message.tool_calls or []
    assert re.fullmatch("[A-Za-z0-9]{9}", call.id)


def test_calls_and_their_results_go_to_the_template(client: openai.OpenAI, text: ModelText, say: Say) -> None:
    say(SAID)
    first = client.chat.completions.create(model="a", messages=CHAT, tools=TOOLS)
    message: Any = first.choices[0].message
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls or []]
    say("Sunny.")
    answer = client.chat.completions.create(model="a", messages=[*CHAT, message, *results], tools=TOOLS)
    assert answer.choices[0].message.content == "Sunny."
    objects = [
        {"function": {"arguments": arguments, "name": name}, "id": call.id, "type": "function"}
        for (name, arguments), call in zip(CALLS, message.tool_calls or [], strict=True)
    ]
    chat = [*CHAT, {"role": "assistant", "content": "I look.\n", "tool_calls": objects}, *results]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(text.chat(chat, literal=True, tools=TOOLS))


NAMED: Any = {"type": "function", "function": {"name": "look"}}


def test_a_named_function_gets_its_arguments(client: openai.OpenAI, say: Say) -> None:
    say('{"city":"Kiel"}')
    assert both(client, tool_choice=NAMED) == [(None, [("look", {"city": "Kiel"})], "tool_calls")]
    say('[{"name":"look","arguments":{"city":"Ulm"}},{"name":"wait","arguments":{}}]')
    assert both(client, tool_choice="required") == [(None, CALLS, "tool_calls")]


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_the_grammar_makes_any_model_call(client: openai.OpenAI, choice: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    how: Any = {"tool_choice": choice, "temperature": 1.0, "seed": 3, "n": 2, "parallel_tool_calls": False}
    for content, calls, reason in both(client, **how):
        assert (content, reason, len(calls)) == (None, "tool_calls", 1)
        name, arguments = calls[0]
        assert arguments["city"] in {"Ulm", "Kiel"} if name == "look" else arguments == {}
        assert choice == "required" or name == "look"


def test_a_schema_that_is_none_is_refused_by_its_field(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "nope"}}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="a", messages=CHAT, tools=tools, tool_choice="required")
    assert refused.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": 7}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"functions": [{"name": "look"}]}, "functions"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(client: openai.OpenAI, change: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "a", "messages": CHAT, "tools": TOOLS, **change})
    assert caught.value.param == param
    assert "\n" not in caught.value.message
