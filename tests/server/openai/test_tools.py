"""Fields of requests with tools: what is refused, and the schemas of answers that are bound to calls."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import msgspec
import pytest

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.server.openai.chat_body import ChatBody
from tpeft_deploy.runtime.server.openai.tools import ToolUse, with_objects
from tpeft_deploy.runtime.text.tool_format import tool_format

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
MOVE = {"properties": {"to": {"$ref": "#/$defs/point"}}, "required": ["to"], "$defs": {"point": POINT}}


def tool(name: Any, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}, **more}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def body(**fields: Any) -> ChatBody:
    return msgspec.convert({"model": "a", "messages": [], **fields}, ChatBody)


def use(*tools: Any, choice: Any = "required", **more: Any) -> ToolUse:
    found = body(tools=tools, tool_choice=choice, **more).tool_use()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([{"type": "function"}], "tools of type 'function'"),
        ([tool("x", type="custom")], "got 'custom' as tool 0"),
        ([tool("x"), tool("")], "names of at most 128 characters, got '' as tool 1"),
        ([tool(7)], "names of at most 128"),
        ([tool("x" * 129)], "names of at most 128"),
        ([tool("x"), tool("x")], "different names, got 'x' twice"),
        ([tool("x", [1])], "a JSON schema"),
        ([tool(f"x{at}") for at in range(129)], "at most 128 tools, got 129"),
        ([tool("x", {"description": "y" * 300_000})], "at most 262,144 bytes"),
        ([tool("x", {"description": "\ud800"})], "expected text"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_without_a_use_are_refused_in_one_line(tools: Any, expected: str, choice: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        body(tools=tools, tool_choice=choice).tool_use()
    assert str(caught.value).startswith("read field 'tools'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", "'none', 'auto', 'required'"),
        ({"type": "allowed_tools"}, "'none', 'auto', 'required'"),
        ({"type": "function"}, "function.name"),
        (named("y"), "one of the tools x, got 'y'"),
    ],
)
def test_a_choice_of_no_tool_is_refused_in_one_line(choice: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        body(tools=[tool("x")], tool_choice=choice).tool_use()
    assert str(caught.value).startswith("read field 'tool_choice'")


def test_a_choice_needs_tools_and_the_answer_to_itself() -> None:
    for choice in ("required", named("x")):
        with pytest.raises(InputError, match="expected tools with it"):
            body(tool_choice=choice).tool_use()
        bound = body(tools=[tool("x")], tool_choice=choice, response_format={"type": "json_object"})
        with pytest.raises(InputError, match="read field 'tool_choice': expected no response_format"):
            bound.check()
        assert bound.constrained
    for none in (None, "auto", "none"):
        own = body(tools=[tool("x")], tool_choice=none, response_format={"type": "json_object"})
        own.check()
        assert body(tool_choice=none).tool_use() is None
        assert not body(tools=[tool("x")], tool_choice=none).constrained
    assert body(tools=[tool("x")], tool_choice="none").tool_use() is None


@pytest.mark.parametrize(("key", "template"), [("arguments", "<tool_call>"), ("parameters", '"parameters" ipython')])
def test_the_schema_of_calls_is_that_of_the_functions(key: str, template: str) -> None:
    form = tool_format(template)
    schema = use(tool("move", MOVE), tool("stop"), tool("go", {})).schema(form)
    assert schema is not None
    valid = jsonschema_rs.validator_for(schema).is_valid
    assert valid([{"name": "move", key: {"to": {"x": 1}}}, {"name": "stop", key: {}}])
    assert valid([{"name": "go", key: {"any": 1}}])
    for wrong in (
        [],
        [{"name": "move", key: {"to": {"x": "1"}}}],
        [{"name": "stop", key: {"a": 1}}],
        [{"name": "y", key: {}}],
    ):
        assert not valid(wrong)
    first = use(tool("stop"), parallel_tool_calls=False).schema(form)
    assert first is not None
    assert not jsonschema_rs.validator_for(first).is_valid([{"name": "stop", key: {}}] * 2)
    of_one = use(tool("move", MOVE), tool("stop"), choice=named("move")).schema(form)
    assert of_one == {"type": "object", **MOVE}
    assert use(tool("stop"), choice="auto").schema(form) is None


def test_answers_are_text_where_the_format_is_not_known() -> None:
    assert use(tool("x"), choice="auto").readers(None) is None
    assert use(tool("x"), choice="auto").shown(None) == ()
    assert use(tool("x")).readers(None) is not None
    mistral = tool_format("[TOOL_CALLS]")
    assert "[TOOL_CALLS]" in use(tool("x"), choice="auto").shown(mistral)
    assert use(tool("x")).shown(mistral) == ()


def test_arguments_in_messages_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "x", "arguments": '{"a": [1]}'}}
    empty = {"function": {"name": "x", "arguments": ""}}
    done = {"function": {"name": "x", "arguments": {"b": 2}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, empty, done]}
    found = with_objects(message, 0)["tool_calls"]
    assert [own["function"]["arguments"] for own in found] == [{"a": [1]}, {}, {"b": 2}]
    assert found[0]["id"] == "1"
    assert call["function"] == {"name": "x", "arguments": '{"a": [1]}'}
    assert with_objects({"role": "user", "tool_calls": []}, 0) == {"role": "user"}
    for wrong in ("{", "[1]", "[" * 9000):
        bad = {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": wrong}}]}
        with pytest.raises(
            InputError, match=r"messages\[3\]': expected tool_calls with arguments that are a JSON object"
        ):
            with_objects(bad, 3)
    for others in ("x", [1], [{"function": 1}]):
        with pytest.raises(InputError, match=r"read field 'messages\[0\]'"):
            with_objects({"role": "assistant", "tool_calls": others}, 0)
