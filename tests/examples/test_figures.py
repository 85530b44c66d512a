"""The docs of the families show the figures of the runs in their real configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.families.figures import RESULTS, table

DOCS = Path(__file__).parents[2] / "docs" / "families"


@pytest.mark.parametrize("results", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_docs_show_the_figures(results: Path) -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    assert table(json.loads(results.read_text(encoding="utf-8"))) in shown
