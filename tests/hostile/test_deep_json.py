"""JSON nested beyond what a parser follows is refused by every reader of files and answers, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tpeft_deploy import Bundle, errors
from tpeft_deploy.bundle.image_facts import IMAGE, ImageFacts
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.bundle.task_store import TaskStore
from tpeft_deploy.bundle.text_files import TextFacts
from tpeft_deploy.client.answers import Answer, document
from tpeft_deploy.client.events import TextEvents
from tpeft_deploy.exporters import pooling
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.base.model import architecture
from tpeft_deploy.quickstart import place as quickstart

DEEP = [
    "[" * 100_000,
    "[" * 9000 + "]" * 9000,
    '{"x":' * 9000 + "1" + "}" * 9000,
    '{"r":' + "[" * 9000 + "]" * 9000 + "}",
]


def _bundle(file: Path) -> Bundle:
    """As much of a bundle as reads a file of its text."""
    manifest = SimpleNamespace(text={IMAGE: None})
    return cast(Bundle, SimpleNamespace(path=file.parent, manifest=manifest, check_file=lambda _: file))


def _quickstart(file: Path) -> None:
    with quickstart.output_directory(file.parent):
        pass


READERS: dict[str, tuple[str, type[errors.TpeftError], Callable[[Path], Any]]] = {
    "manifest": ("manifest.json", errors.BundleError, lambda file: Bundle.open(file.parent)),
    "manifest's text": (
        "manifest.json",
        errors.IntegrityError,
        lambda file: Manifest.from_json(file.read_text(), source=str(file)),
    ),
    "adapter's record": (
        "adapters/a/b/adapter.json",
        errors.IntegrityError,
        lambda file: TaskStore(file.parents[3]).version("a", "b"),
    ),
    "facts of the text": ("text.json", errors.IntegrityError, lambda file: TextFacts.read(_bundle(file))),
    "facts of images": ("image.json", errors.IntegrityError, lambda file: ImageFacts.read(_bundle(file))),
    "adapter's configuration": ("adapter_config.json", errors.AdapterError, lambda file: load_adapter(file.parent)),
    "model's configuration": ("config.json", errors.UnsupportedBase, lambda file: architecture(file.parent)),
    "tokenizer's configuration": (
        "tokenizer_config.json",
        errors.UnsupportedBase,
        lambda file: pooling.most_tokens(file.parent),
    ),
    "mark of a quickstart": (quickstart.MARKER, errors.TpeftError, _quickstart),
    "server's answer": (
        "answer",
        errors.ServerError,
        lambda file: document(Answer(200, {}, memoryview(file.read_bytes()))),
    ),
    "server's event": (
        "event",
        errors.ServerError,
        lambda file: TextEvents("generate").read(b"data: " + file.read_bytes() + b"\n"),
    ),
}


@pytest.mark.parametrize("text", DEEP, ids=["open", "lists", "objects", "a field"])
@pytest.mark.parametrize("name", READERS)
def test_deep_json_is_refused_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    place, kind, reader = READERS[name]
    file = tmp_path / "at" / place
    file.parent.mkdir(parents=True)
    (file.parent / "adapter_model.safetensors").write_bytes(b"")
    file.write_text(text)
    with pytest.raises(kind) as caught:
        reader(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
