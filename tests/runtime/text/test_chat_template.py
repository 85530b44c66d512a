from __future__ import annotations

from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.runtime.chat_templates import TEMPLATES
from tests.helpers.runtime.tokenizers_of_styles import fast
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.text.chat_template import ChatTemplate

TOOL = {"type": "function", "function": {"name": "wetter", "description": "<b>Größe</b> & 'Ort'", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln", "tage": 3}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "short": [{"role": "user", "content": "Hello"}],
    "turns": [
        {"role": "system", "content": " Be <brief> & 'kind'. \n"},
        {"role": "user", "content": "  1+1?\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2", "name": None},
        {"role": "user", "content": "日本語 🦊"},
    ],
    "reasoning": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "thinking": "because"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": {"grad": 21}},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A fox"}]},
    ],
    "twice": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}
OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False, "tools": [TOOL]},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"add_generation_prompt": False, "continue_final_message": True},
]


def render(template: ChatTemplate, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """Text of a chat; None where the template refuses it."""
    flags = {key: value for key, value in options.items() if key in ("add_generation_prompt", "continue_final_message")}
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    variables |= {key: value for key, value in options.items() if key not in flags}
    try:
        return template.render(chat, variables=variables, **flags)
    except InputError:
        return None


def expected(source: str, chat: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    try:
        text: str = fast("byte-level").apply_chat_template(chat, chat_template=source, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError):
        return None
    return text


@pytest.mark.parametrize("family", TEMPLATES)
def test_it_renders_what_transformers_does(family: str) -> None:
    template, rendered = ChatTemplate(TEMPLATES[family]), 0
    for chat in CHATS.values():
        for options in OPTIONS:
            wanted = expected(TEMPLATES[family], chat, options)
            assert render(template, chat, options) == wanted
            rendered += wanted is not None
    assert rendered > 8


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=12)), min_size=1))
def test_it_does_for_any_texts(turns: list[tuple[str, str]]) -> None:
    chat = [{"role": role, "content": content} for role, content in turns]
    for family in ("zephyr", "qwen"):
        wanted = expected(TEMPLATES[family], chat, OPTIONS[0])
        assert render(ChatTemplate(TEMPLATES[family]), chat, OPTIONS[0]) == wanted


def test_a_refusal_of_the_template_is_one_line() -> None:
    with pytest.raises(InputError, match=r"refuses the messages \(Conversation roles must alternate"):
        ChatTemplate(TEMPLATES["gemma"]).render(CHATS["twice"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__dict__ = 1 %}",
        "{{ dict.__mro__[1] }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    try:
        text = ChatTemplate(source).render(CHATS["short"])
    except InputError:
        return
    assert not text.strip()  # an undefined value


@pytest.mark.parametrize(
    "messages", [[], "text", [{"content": "x"}], [{"role": "user", "content": object()}], [1], None]
)
def test_what_are_no_messages_is_refused(messages: Any) -> None:
    with pytest.raises(InputError):
        ChatTemplate(TEMPLATES["zephyr"]).render(messages)


def test_a_text_that_is_no_template_is_refused() -> None:
    with pytest.raises(InputError, match="expected a Jinja template"):
        ChatTemplate("{% for %}")


def test_the_messages_stay_as_they_are() -> None:
    chat = [{"role": "user", "content": "x"}]
    ChatTemplate(TEMPLATES["chatml"]).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert chat == [{"role": "user", "content": "x"}]
