"""How models write tool calls: the formats that chat templates show."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["JSON_LIST", "ToolFormat", "tool_format"]

_OTHERS = ("<function=", "<arg_key>")  # of formats that are not JSON between the same markers
_LLAMA = re.compile(r"<\|python_tag\|>|ipython|function name")


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        name: name of the format.
        marker: text before a call.
        closer: text behind a call; empty for none.  It may be absent at the end of a text.
        opening: characters that the JSON behind a marker begins with.
        key: name of the arguments, as the model writes it; parsers take "arguments" and "parameters".
        tokens: special tokens that are part of the format.
        bare: separator of calls without a marker, which begin the text; None where each call has a marker.
        named: whether a function's name may stand between the marker and the JSON of its arguments.
        short_ids: whether the template takes only ids of 9 letters and digits.
    """

    name: str
    marker: str
    closer: str = ""
    opening: str = "{"
    key: str = "arguments"
    tokens: tuple[str, ...] = ()
    bare: str | None = None
    named: bool = False
    short_ids: bool = False


_HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", tokens=("<tool_call>", "</tool_call>"))
_MISTRAL = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    opening="[{",
    tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    named=True,
    short_ids=True,
)
_LLAMA_JSON = ToolFormat("llama", "<|python_tag|>", key="parameters", tokens=("<|python_tag|>",), bare=";")
JSON_LIST = ToolFormat("json", "", bare=",")
"""A JSON list of calls and nothing else, as a constraint makes it."""


def tool_format(template: str) -> ToolFormat | None:
    """Return the format that a chat template shows; None for none that is known.

    Args:
        template: text of the template.
    """
    if _MISTRAL.marker in template:
        return _MISTRAL
    if _HERMES.marker in template:
        return None if any(mark in template for mark in _OTHERS) else _HERMES
    return _LLAMA_JSON if '"parameters"' in template and _LLAMA.search(template) else None
