"""Calls in a text are found however it is cut, and what is no call stays as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.counting import operations
from tests.helpers.runtime.chat_templates import TEMPLATES
from tpeft_deploy.runtime.text.chat_template import ChatTemplate
from tpeft_deploy.runtime.text.tool_calls import NamedCallReader, ToolCallParser
from tpeft_deploy.runtime.text.tool_format import JSON_LIST, ToolFormat, tool_format
from tpeft_deploy.runtime.text.tool_json import ToolCall

NAMES = ("look", "add", "get_weather")


def form(family: str) -> ToolFormat:
    found = tool_format(TEMPLATES[family])
    assert found is not None
    return found


FORMS = {"hermes": form("hermes"), "llama": form("llama tools"), "mistral": form("mistral tools"), "json": JSON_LIST}
HERMES_LOOK = '<tool_call>{"name": "look"}</tool_call>'
BROKEN = '<tool_call>{"name": }</tool_call>'
LOOK: tuple[str, Any] = ("look", {})
ADD = ("add", {"a": [1, 2.5], "b": "x"})
READ: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>', "", [LOOK]),
    ("hermes", '<tool_call>{"name": "look"}', "", [LOOK]),
    ("hermes", '<tool_call>{"name": "look", "arguments": {}}\n</tool_', "", [LOOK]),
    ("hermes", 'Let me see.\n<tool_call>{"name": "look", "arguments": "{}"}</tool_call>\n', "Let me see.\n", [LOOK]),
    (
        "hermes",
        f'\n\n{HERMES_LOOK}\n<tool_call>{{"arguments": {{"a": [1, 2.5], "b": "x"}}, "name": "add"}}</tool_call>\nDone',
        "\nDone",
        [LOOK, ADD],
    ),
    (
        "hermes",
        '<tool_call>{"name": "look", "arguments": {"a": "</tool_call>", "b": "\\"}\n{\\\\"}}</tool_call>',
        "",
        [("look", {"a": "</tool_call>", "b": '"}\n{\\'})],
    ),
    ("hermes", BROKEN + HERMES_LOOK, BROKEN, [LOOK]),
    ("llama", '{"name": "look", "parameters": {}}', "", [LOOK]),
    ("llama", ' <|python_tag|>{"name": "look", "parameters": {}}\n', "", [LOOK]),
    (
        "llama",
        '{"name": "look", "parameters": {}}; {"name": "add", "arguments": {"a": [1, 2.5], "b": "x"}}',
        "",
        [LOOK, ADD],
    ),
    (
        "llama",
        '<|python_tag|>{"name": "look", "parameters": {}}; <|python_tag|>{"name": "look", "parameters": {}}',
        "",
        [LOOK, LOOK],
    ),
    ("llama", 'So: <|python_tag|>{"name": "look", "parameters": {}}', "So: ", [LOOK]),
    ("llama", '{"name": "look", "parameters": {}} and more', " and more", [LOOK]),
    ("mistral", '[TOOL_CALLS] [{"name": "look", "arguments": {}, "id": "abcdefghi"}]', "", [LOOK]),
    (
        "mistral",
        'Yes[TOOL_CALLS][{"name": "look", "arguments": {}}, {"name": "add", "arguments": {"a": [1, 2.5], "b": "x"}}]',
        "Yes",
        [LOOK, ADD],
    ),
    (
        "mistral",
        '[TOOL_CALLS]look[ARGS]{}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": [1, 2.5], "b": "x"}',
        "",
        [LOOK, ADD],
    ),
    ("mistral", '[TOOL_CALLS]look{}', "", [LOOK]),
    ("mistral", '[TOOL_CALLS]{"name": "look", "arguments": {}}', "", [LOOK]),
    ("json", '[{"name":"look","parameters":{}},{"name":"add","arguments":{"a":[1,2.5],"b":"x"}}]', "", [LOOK, ADD]),
    ("json", '[{"name":"look","parameters":{}},{"name":"ad', ',{"name":"ad', [LOOK]),
]  # fmt: skip
TEXTS = {
    "hermes": [
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "look", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "look", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "look", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "look", "arguments": {}}</tool_call',
        '<tool_call>{"name": "look", "arguments": {}} no',
        "<tool_call>look</tool_call>",
        "<tool_call>[]</tool_call>",
        "a <tool_call",
        "a < b <tool_call> \n",
        '{"name": "look", "parameters": {}}',
        f'<tool_call>{" " * 200}{{"name": "look"}}</tool_call>',
        f'<tool_call>{"[" * 9000}',
        f'<tool_call>{{"name": "look", "arguments": {{"x": {"1" * 5000}}}}}</tool_call>',
        f'<tool_call>{{"name": "look", "arguments": {{"x": {"[" * 9000}{"]" * 9000}}}}}</tool_call>',
    ],
    "llama": [
        '{"name": "look"}',
        '{"answer": 1}',
        ' {"name": "nobody", "parameters": {}}',
        'It is {"name": "look", "parameters": {}}',
        "<|python_tag|>print(1)",
        "<|python_tag",
        "  ",
    ],
    "mistral": [f"[TOOL_CALLS]{rest}" for rest in ("", "[]", "nobody[ARGS]{}", "look me up{}", "x", "look[ARGS][]")],
    "json": ["[", "[]", '[{"name":"look"', '{"a": 1}', "so"],
}  # fmt: skip
NOT_CALLS = [(name, text) for name, texts in TEXTS.items() for text in texts if not text.endswith("</tool_call")]


def read(name: str, pieces: Sequence[str], **how: Any) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolCallParser(FORMS[name], NAMES, **how)
    found = [own for piece in pieces for own in parser.push(piece)] + parser.flush()
    content = "".join(own for own in found if isinstance(own, str))
    return content, [(own.name, json.loads(own.arguments)) for own in found if isinstance(own, ToolCall)]


@pytest.mark.parametrize(("name", "text", "content", "calls"), READ)
def test_calls_are_found_whole_and_by_characters(name: str, text: str, content: str, calls: Any) -> None:
    assert read(name, [text]) == (content, calls)
    assert read(name, list(text)) == (content, calls)
    assert read(name, list(text), several=False) == (content, calls[:1])


@pytest.mark.parametrize(("name", "text"), NOT_CALLS)
def test_what_is_no_call_is_content_unchanged(name: str, text: str) -> None:
    for pieces in ([text], list(text)):
        assert read(name, pieces) == (text, [])


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
def test_cuts_change_nothing_and_no_text_is_lost(name: str, data: st.DataObject) -> None:
    known = [text for own, text, _, _ in READ if own == name] + [text for text in TEXTS[name] if len(text) < 100]
    parts = [
        *known,
        "<",
        "[",
        "]",
        "{",
        "}",
        '"',
        "\\",
        ";",
        ",",
        " ",
        "\n",
        "[ARGS]",
        FORMS[name].marker,
        "look",
        "a b",
    ]
    pieces = data.draw(st.lists(st.sampled_from(parts) | st.text(max_size=3), max_size=8))
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    cut = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = read(name, [text])
    assert read(name, cut) == read(name, list(text)) == (content, calls)
    assert calls or content == text
    rest = iter(text)
    assert all(character in rest for character in content)  # in order


def test_text_that_begins_no_marker_is_not_held_back() -> None:
    parser = ToolCallParser(FORMS["hermes"], NAMES)
    assert parser.push("Hello <tool") == ["Hello "]
    assert parser.push("s> <") == ["<tools> "]
    assert parser.push("tool_call>{") == []
    assert parser.push('"name": "look"} </tool_call>so') == [("look", "{}", True), "so"]
    assert parser.flush() == []


def test_arguments_are_json_that_can_be_sent() -> None:
    parser = ToolCallParser(FORMS["hermes"], NAMES)
    [call] = parser.push(
        '<tool_call>{"name": "look", "arguments": {"a": "\\ud800é", "b": 12345678901234567890}}</tool_call>'
    )
    assert isinstance(call, ToolCall)
    assert call.arguments.encode()
    assert json.loads(call.arguments) == {"a": "\ud800é", "b": 12345678901234567890}
    [call] = parser.push('<tool_call>{"name": "look", "arguments": {"a": "é"}}</tool_call>')
    assert call == ("look", '{"a": "é"}', True)


def test_arguments_of_one_function_go_out_as_they_come() -> None:
    reader = NamedCallReader("look")
    assert reader.push("") == []
    assert reader.push('{"a"') == [("look", '{"a"', True)]
    assert reader.push(":1}") == [("look", ":1}", False)]
    assert reader.flush() == []


@pytest.mark.parametrize("family", ["hermes", "llama tools", "mistral tools", "mistral args"])
def test_what_the_template_renders_of_a_call_is_read_as_that_call(family: str) -> None:
    function = {"name": "add", "arguments": {"a": [1, 2.5], "b": "x <tool_call>"}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    template = ChatTemplate(TEMPLATES[family])
    asked: list[Any] = [{"role": "user", "content": "?"}]
    how: Any = {"variables": {"bos_token": "", "eos_token": ""}, "add_generation_prompt": False}
    before = template.render(asked, **how)
    text = template.render([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], **how)[len(before) :]
    for mark in ("<|im_start|>assistant", "<|im_end|>", "<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>"):
        text = text.replace(mark, "")
    parser = ToolCallParser(form(family), NAMES)
    [found] = [*parser.push(text), *parser.flush()]
    assert isinstance(found, ToolCall)
    assert (found.name, json.loads(found.arguments)) == ("add", function["arguments"])


@pytest.mark.parametrize("part", ["<tool_call>{", '<tool_call>{"', '<tool_call>{"a":"<tool_call>{\\"', "<tool_call> "])
def test_the_time_is_linear_in_the_text(part: str) -> None:
    def cost(times: int) -> int:
        return operations(lambda: read("hermes", [part * times]))

    cost(10)
    assert cost(1000) < 15 * cost(100)
