"""What the server tells of a bundle's text, and of the caller."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.exporters import small_images
from tests.helpers.server import encoder_bundles
from tests.server.conftest import Served
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.v2.server_metadata import text_calls


def test_caller_and_components(served: Served, towers_bundle: Bundle) -> None:
    from tpeft_deploy.runtime.server.v2.server_metadata import ServerMetadata

    document = served.service.server_metadata(served.who("acme", "infer"))
    assert document["caller"] == {"tenant": "acme", "role": "infer"}
    assert (document["components"], document["text"]) == ([], [])
    both = ServerMetadata(towers_bundle).document(served.who())
    assert both["components"] == list(towers_bundle.components)


def test_text(talking: Bundle) -> None:
    assert text_calls(talking) == ["chat", "completions"]


@pytest.mark.parametrize(
    ("kind", "expected"), [("embed", ["embeddings"]), ("images", ["chat", "completions", "images"])]
)
def test_other_bundles(tmp_path: Path, kind: str, expected: list[str]) -> None:
    bundle = encoder_bundles.embedding_bundle(tmp_path)[0] if kind == "embed" else small_images.exported(tmp_path)
    assert text_calls(bundle) == expected
