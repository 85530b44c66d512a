"""JSON of tool calls in text: where it ends, and the calls that it has."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

__all__ = ["JsonSpan", "NoCallError", "ToolCall", "calls"]

_OUTSIDE = re.compile(r"[^\s:,0-9a-zE.+\-]")  # outside of JSON strings; a marker has characters that are not JSON there
_INSIDE = re.compile(r'["\\]')


class ToolCall(NamedTuple):
    """A call of a function.

    Attributes:
        name: name of the function.
        arguments: JSON of an object; the beginning of it where more follows.
        begins: whether the call begins here; else the arguments continue those of the call before.
    """

    name: str
    arguments: str
    begins: bool = True


class NoCallError(Exception):
    """Raised for text that begins like calls, and is none."""


class JsonSpan:
    """Finds the end of a JSON object or list in text that comes in pieces.

    It leaves the syntax of the value to `calls`, and gives up at characters that JSON has in strings alone.  Therefore
    reading again behind each marker that turns out to begin no call takes linear time: of any three markers, at least
    one ends the reading that began with another.

    Args:
        start: place of the first bracket.
    """

    def __init__(self, start: int) -> None:
        self.start = self._at = start
        self._depth, self._quoted = 0, False

    def end(self, text: str) -> int | None:
        """Return the place behind the value; None if more text is needed.

        Raises:
            NoCallError: it is no JSON.
        """
        while found := (_INSIDE if self._quoted else _OUTSIDE).search(text, self._at):
            self._at = found.end()
            if found[0] == '"':
                self._quoted = not self._quoted
            elif found[0] == "\\" and self._quoted:
                self._at += 1
            elif found[0] in "{[":
                self._depth += 1
            elif found[0] in "}]":
                self._depth -= 1
                if not self._depth:
                    return self._at
            else:
                raise NoCallError
        self._at = max(self._at, len(text))
        return None


def calls(text: str, name: str | None, names: frozenset[str], *, strict: bool) -> list[ToolCall]:
    """Calls of JSON: of an object or a list of them, or the arguments of a function that is named before.

    Args:
        text: JSON.
        name: name of the function; None where the JSON has it.
        names: names of the functions.
        strict: whether a call without arguments is none.

    Raises:
        NoCallError: it is not JSON of calls to these functions.
    """
    try:
        value: Any = json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
        if name is not None:
            value = {"name": name, "arguments": value}
        several = value if isinstance(value, list) else [value]
        found = [_call(own, names, strict) for own in several]
    except (ValueError, RecursionError) as error:
        raise NoCallError from error
    if not found:
        raise NoCallError
    return found


def _call(value: Any, names: frozenset[str], strict: bool) -> ToolCall:
    given = value if isinstance(value, dict) else {}
    name = given.get("name")
    key = next((key for key in ("arguments", "parameters") if key in given), None)
    arguments = given[key] if key is not None else None if strict else {}
    if isinstance(arguments, str):  # JSON within JSON, as some models write it
        arguments = json.loads(arguments, strict=False, parse_constant=_refuse, parse_float=_finite)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        raise NoCallError
    return ToolCall(name, _dumped(arguments))


def _dumped(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # A lone surrogate is text in JSON alone.
    return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(value)


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
