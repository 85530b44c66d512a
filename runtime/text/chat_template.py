"""Chat templates, rendered as `apply_chat_template` of transformers renders them, in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tpeft_deploy.errors import InputError

__all__ = ["ChatTemplate"]

_DOING = "render the chat template"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; the first is the standard
_PROBE = "CONTENT PROBE"
_END = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A template in Jinja's language.

    Args:
        source: text of the template.

    Raises:
        InputError: the text is not a template.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InputError("read the chat template", expected="a Jinja template", got=str(error)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Text of a conversation.

        Args:
            messages: messages with `role` and `content`, of JSON types.
            variables: further variables of the template (`tools`, `documents`, `bos_token`, `enable_thinking`, ...).
            add_generation_prompt: whether the text ends with the beginning of an answer.
            continue_final_message: whether the text ends with the last message's, for the model to continue.

        Raises:
            InputError: the messages are of other types, or the template refuses them.
        """
        chat = _checked(messages)
        if not self._takes_strings:
            for message in chat:
                if isinstance(message.get("content"), str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
        others = {"tools": None, "documents": None, **_plain(dict(variables or {}))}
        last = ""
        if continue_final_message:
            if add_generation_prompt:
                raise InputError(_DOING, problem="add_generation_prompt and continue_final_message exclude each other")
            last = _mark_end(chat[-1])
        try:
            text = self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **others)
        except Exception as error:  # of any type: a template computes with whatever the messages hold
            raise InputError(_DOING, problem=f"the template refuses the messages ({error})") from error
        return _continued(text, last) if continue_final_message else text

    @cached_property
    def _takes_strings(self) -> bool:
        """Whether contents may be strings; some templates for images write lists of parts only."""
        parts = [{"type": "text", "text": _PROBE}]
        return self._writes(_PROBE) or not self._writes(parts)

    def _writes(self, content: Any) -> bool:
        try:
            return _PROBE in self._template.render(messages=[{"role": "user", "content": content}])
        except Exception:  # of any type: a template computes with whatever the messages hold
            return False


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, the mark of what an assistant said: rendered as what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` of templates: an object without the attributes of a type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of templates: without attributes that begin with an underscore."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        attributes = dict(*args, **values)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace begins with an underscore")


def _plain(value: Any) -> Any:
    """Copy of a value in JSON types, so that a template gets at no method of another object."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(_DOING, expected="messages of JSON types", got=str(error)) from error


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Copies of messages without fields that are null, their reasoning under every name that templates read."""
    chat = _plain(messages)
    if not isinstance(chat, list) or not chat or not all(isinstance(m, dict) and "role" in m for m in chat):
        raise InputError(_DOING, expected="a list of messages with 'role' and 'content'", got=str(messages)[:80])
    result = []
    for message in chat:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in _REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        result.append(kept)
    return result


def _mark_end(message: dict[str, Any]) -> str:
    """Put a mark behind the content of a message; returns the content."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            last: str = block["text"]
            block["text"] = last + _END
            return last
    raise InputError(_DOING, problem="the last message has no text to continue")


def _continued(text: str, last: str) -> str:
    """Text up to the mark."""
    place = text.rfind(_END.strip())
    if place < 0 or last.strip() not in text:
        raise InputError(_DOING, problem="the template leaves out the last message, which is to be continued")
    # A template that trims messages has trimmed the mark too.
    return text[:place] if text[place:].startswith(_END) else text[:place].rstrip()
