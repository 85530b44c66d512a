from __future__ import annotations

import pytest

from tests.helpers.runtime.chat_templates import TEMPLATES
from tpeft_deploy.runtime.text.tool_format import tool_format

FORMATS = {
    "hermes": "hermes",
    "qwen": "hermes",
    "llama": "llama",
    "llama tools": "llama",
    "mistral tools": "mistral",
    "mistral args": "mistral",
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_format_is_that_of_the_template(family: str) -> None:
    found = tool_format(TEMPLATES[family])
    assert (None if found is None else found.name) == FORMATS.get(family)


def test_other_formats_with_the_same_markers_are_not_known() -> None:
    assert tool_format("<tool_call>\n<function=name>\n<parameter=x>") is None
    assert tool_format("<tool_call>name\n<arg_key>x</arg_key>") is None
    assert tool_format("") is None
