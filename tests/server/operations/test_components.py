from __future__ import annotations

import pytest

from tpeft_deploy import Bundle
from tpeft_deploy.errors import NotFound, ProtocolError
from tpeft_deploy.runtime.server.operations.components import Components


@pytest.mark.parametrize(
    ("name", "parameter", "found"),
    [("a", None, None), ("a/text", None, "text"), ("a", "text", "text"), ("a/text", "text", "text")],
)
def test_a_component_is_named_in_either_way(
    towers_bundle: Bundle, name: str, parameter: str | None, found: str | None
) -> None:
    assert Components(towers_bundle).split(name, parameter) == ("a", found)


@pytest.mark.parametrize(("name", "parameter"), [("a/", None), ("a/audio", None), ("a", ""), ("a/text/text", "text")])
def test_unknown_components(towers_bundle: Bundle, name: str, parameter: str | None) -> None:
    with pytest.raises(NotFound, match="among image, text"):
        Components(towers_bundle).split(name, parameter)


def test_two_components_are_refused(towers_bundle: Bundle) -> None:
    with pytest.raises(ProtocolError, match="one component"):
        Components(towers_bundle).split("a/text", "image")


def test_names_where_there_is_one_graph(conv_bundle: Bundle, towers_bundle: Bundle) -> None:
    alone, several = Components(conv_bundle), Components(towers_bundle)
    assert (alone.names("a"), alone.one("a", None)) == (["a"], "model")
    assert several.names("a") == ["a/image", "a/text"]
    with pytest.raises(ProtocolError, match="a/image, a/text"):
        several.one("a", None)
