"""Tools of a chat: the functions that a model may call, how it is made to, and how its calls are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from tpeft_deploy.errors import InputError, brief
from tpeft_deploy.runtime.text.tool_calls import CallReader, NamedCallReader, ToolCallParser
from tpeft_deploy.runtime.text.tool_format import JSON_LIST, ToolFormat

__all__ = ["CallReaders", "ToolUse", "with_objects"]

_MOST = 128  # as in OpenAI's API
_LARGEST = 256 * 1024
_NAME = 128
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class CallReaders(NamedTuple):
    """How the calls of an answer are read.

    Attributes:
        make: makes the reader of one sequence.
        short_ids: whether ids of calls have 9 letters and digits, as the chat template takes no others.
    """

    make: Callable[[], CallReader]
    short_ids: bool


@dataclass(frozen=True)
class ToolUse:
    """Tools of a request, and which of them the answer calls.

    Attributes:
        functions: name -> JSON schema of its arguments.
        forced: whether the answer is nothing but calls.
        named: function that the answer calls; None for any.
        several: whether an answer may have more than one call.
    """

    functions: Mapping[str, Mapping[str, Any]]
    forced: bool
    named: str | None
    several: bool

    @classmethod
    def of(cls, tools: Sequence[Any], choice: str | Mapping[str, Any] | None, *, several: bool) -> ToolUse | None:
        """Read the fields of a request.

        Args:
            tools: field `tools`.
            choice: field `tool_choice`.
            several: field `parallel_tool_calls`.

        Returns:
            The tools; None where none may be called.

        Raises:
            InputError: a tool has no name or that of another, there are too many, or the choice is none of them.
        """
        functions = _functions(tools)
        named = _named(choice, functions)
        if choice == "none" or not functions:
            return None
        return cls(functions, choice not in (None, "auto"), named, several)

    def schema(self, form: ToolFormat | None) -> dict[str, Any] | None:
        """Return the JSON schema of the answer: of a function's arguments, or of a list of calls; None for text.

        Args:
            form: how the model writes calls.
        """
        if not self.forced:
            return None
        if self.named is not None:
            return dict(self.functions[self.named])
        key = "arguments" if form is None else form.key
        places = {name: f"#/$defs/{index}" for index, name in enumerate(self.functions)}
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: {"$ref": place}},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for name, place in places.items()
        ]
        most = {} if self.several else {"maxItems": 1}
        moved = {str(index): _moved(self.functions[name], place) for index, (name, place) in enumerate(places.items())}
        return {"$defs": moved, "type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}

    def readers(self, form: ToolFormat | None) -> CallReaders | None:
        """Return how the calls of the answer are read; None where the answer is text.

        Args:
            form: how the model writes calls.
        """
        short = form is not None and form.short_ids
        named = self.named
        if named is not None:
            return CallReaders(lambda: NamedCallReader(named), short)
        known = JSON_LIST if self.forced else form
        if known is None:
            return None
        return CallReaders(lambda: ToolCallParser(known, self.functions, several=self.several), short)

    def shown(self, form: ToolFormat | None) -> tuple[str, ...]:
        """Return the special tokens that the text of the answer has to show.

        Args:
            form: how the model writes calls.
        """
        return () if self.forced or form is None else form.tokens


def with_objects(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    """Copy of a message with the arguments of its tool calls as objects, as chat templates read them.

    Args:
        message: message of a chat.
        at: place of the message, for errors.

    Raises:
        InputError: a call has no function, or its arguments are no JSON object.
    """
    found = dict(message)
    calls = found.get("tool_calls")
    if not calls:  # templates take an empty list for a call
        found.pop("tool_calls", None)
        return found
    doing = f"read field 'messages[{at}]'"
    if not isinstance(calls, list):
        raise InputError(doing, expected="tool_calls to be a list", got=type(calls).__name__)
    changed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise InputError(doing, expected="tool_calls with a function", got=str(call)[:80])
        changed.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"), doing)}})
    return {**found, "tool_calls": changed}


def _arguments(given: Any, doing: str) -> Any:
    if not isinstance(given, str):
        return {} if given is None else given
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(doing, expected="tool_calls with arguments that are a JSON object", got=repr(given[:80]))
    return found


def _functions(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    doing, found = "read field 'tools'", dict[str, Mapping[str, Any]]()
    if len(tools) > _MOST:
        raise InputError(doing, expected=f"at most {_MOST} tools", got=len(tools))
    if (size := _size(tools, doing)) > _LARGEST:
        raise InputError(doing, expected=f"at most {_LARGEST:,} bytes", got=f"{size:,}")
    for at, tool in enumerate(tools):
        kind, function = tool.get("type"), tool.get("function")
        if kind != "function" or not isinstance(function, dict):
            got = f"{str(kind)[:40]!r} as tool {at}"
            raise InputError(doing, expected="tools of type 'function' with a function", got=got)
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not 0 < len(name) <= _NAME:
            expected = f"functions with names of at most {_NAME} characters"
            raise InputError(doing, expected=expected, got=f"{str(name)[:40]!r} as tool {at}")
        if name in found:
            raise InputError(doing, expected="functions of different names", got=f"{name!r} twice")
        if not isinstance(schema, dict | None):
            raise InputError(doing, expected="parameters that are a JSON schema", got=f"others in tool {at}")
        found[name] = _NOTHING if schema is None else {"type": "object", **schema}
    return found


def _size(tools: Sequence[Any], doing: str) -> int:
    try:
        return len(msgspec.json.encode(tools))
    except RecursionError as error:
        raise InputError(doing, expected="values nested less deeply", got="deep ones") from error
    except ValueError as error:  # a lone surrogate
        raise InputError(doing, expected="text", got=brief(error, 100)) from error


def _named(choice: str | Mapping[str, Any] | None, functions: Mapping[str, object]) -> str | None:
    doing = "read field 'tool_choice'"
    if choice in (None, "none", "auto"):
        return None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(name, str):
        expected = "'none', 'auto', 'required', or an object of type 'function' with function.name"
        raise InputError(doing, expected=expected, got=repr(choice)[:80])
    if not functions:
        raise InputError(doing, expected="tools with it", got="none")
    if name is not None and name not in functions:
        known = ", ".join(functions)
        raise InputError(doing, expected=f"one of the tools {known[:200]}", got=repr(name[:80]))
    return name


def _moved(schema: Any, place: str) -> Any:
    """Copy of a schema with the references within it as they are where it is part of another schema."""
    if isinstance(schema, Mapping):
        return {
            key: place + own[1:] if key == "$ref" and isinstance(own, str) and own[:1] == "#" else _moved(own, place)
            for key, own in schema.items()
        }
    return [_moved(own, place) for own in schema] if isinstance(schema, list) else schema
