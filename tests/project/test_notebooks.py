"""What is committed of docs/notebooks; `make notebooks` runs them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_every_notebook_is_on_the_site() -> None:
    pages = (ROOT / "mkdocs.yml").read_text()
    assert len(NOTEBOOKS) == pages.count("notebooks/") == 3
    assert all(f"- notebooks/{path.stem}.md\n" in pages for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_small(path: Path) -> None:
    cells: list[dict[str, Any]] = [
        cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "make notebooks ARGS=--write"
    for cell in cells:
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"]
        pictures = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(pictures) == ("alt" in cell["metadata"])
        assert all(len(base64.b64decode(picture)) < 150_000 for picture in pictures)
