"""The generated pages of docs/reference are what the code says, and the site has every page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import errors, finder, zoo
from docs.generate.__main__ import PAGES
from tests.helpers.exporters.layers import CASES
from tpeft_deploy.formats import catalogue

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = DOCS / "reference"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_current(name: str) -> None:
    assert (REFERENCE / f"{name}.md").read_text() == import_module(f"docs.generate.{name}").page(), (
        "run `make reference`"
    )


def test_the_zoo_has_every_architecture_of_the_tests() -> None:
    sections = (REFERENCE / "zoo.md").read_text().split("\n## ")[1:]
    shown = {
        (section.partition("\n")[0], name)
        for section in sections
        for name in re.findall(r"^\| ([^|]+?) \| [^-]", section, re.MULTILINE)
        if name != "architecture"
    }
    assert shown == {(entry.kind, entry.name) for entry in zoo.ENTRIES}, "run `make zoo`"
    assert all((DOCS.parent / entry.tests).is_file() for entry in zoo.ENTRIES)


def test_the_finder_knows_every_layer_of_the_readers_and_every_case_of_the_matrix() -> None:
    labels = {label for _, about in catalogue.abouts() for label in about.layers.split(", ")}
    assert labels == set(finder.LABELS)
    assert {name for cases in finder.LAYERS.values() for name in cases} == set(CASES)
    page = (REFERENCE / "finder.md").read_text()
    assert all(f"(`{name}`)" in page for name, _ in catalogue.abouts())


def test_every_error_has_a_cure() -> None:
    kinds = dict(errors.classes())
    bases = {kind.__bases__[0].__name__ for kind in kinds.values()}
    assert set(errors.CURES) == set(kinds) - bases


def _files(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _files(item)


def test_the_navigation_has_every_page() -> None:
    config = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())
    shown = Counter(_files(config["nav"]))
    assert set(shown.values()) == {1}
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages - set(shown) == set(), "add the page to `nav` in mkdocs.yml"
    written = {f"notebooks/{own.stem}.md" for own in (DOCS / "notebooks").glob("*.ipynb")}
    assert set(shown) - pages == written | {"results.md", "benchmark-notes.md"}  # as the site is built
