"""CONTRIBUTING.md and docs/internals name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [CONTRIBUTING, *sorted((ROOT / "docs" / "internals").glob("*.md"))]


def _paths(text: str) -> list[str]:
    """Spans in backticks that are paths: with a slash or the ending of a source file, and nothing but names."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return [s for s in spans if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", s) and ("/" in s or s.endswith((".py", ".md")))]


def _map(text: str) -> list[tuple[str, list[str]]]:
    """Each folder of the map with the modules that its item names; glosses are in parentheses."""
    section = text.partition("\n## The map\n")[2].partition("\n## ")[0]
    items = re.findall(r"^- (.+(?:\n  .+)*)", section, re.MULTILINE)
    found = []
    for item in items:
        folders, _, modules = re.sub(r"\([^)]*\)", "", " ".join(item.split())).partition(":")
        named = [name.strip() for name in modules.split(",") if name.strip()]
        found += [(folder, named) for folder in re.findall(r"`([^`]+)`", folders)]
    return found


def test_contributing_has_under_150_lines() -> None:
    assert len(CONTRIBUTING.read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page: Path) -> None:
    named = _paths(page.read_text())
    assert len(named) > 5
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page.relative_to(ROOT)} names what is not there: {missing}"


def test_every_module_of_the_map_exists() -> None:
    items = _map(CONTRIBUTING.read_text())
    assert sum(len(named) for _, named in items) > 200
    missing = [
        f"{folder}{name}"
        for folder, named in items
        for name in named
        if not ((ROOT / folder / f"{name}.py").is_file() or (ROOT / folder / name / "__init__.py").is_file())
    ]
    assert not missing, f"the map names modules that are not there: {missing}"


def test_every_package_is_on_the_map() -> None:
    items = _map(CONTRIBUTING.read_text())
    on_it = {folder.rstrip("/") for folder, _ in items}
    on_it |= {f"{folder}{name}" for folder, named in items for name in named}
    packages = {
        str(file.parent.relative_to(ROOT))
        for library in ("exporters", "runtime", "tpeft_deploy")
        for file in (ROOT / library).rglob("__init__.py")
        if not {"exporters", "runtime"} & set(file.relative_to(ROOT).parts[1:])  # links, once more
    }
    assert len(packages) > 40
    assert packages <= on_it, f"the map lacks {sorted(packages - on_it)}"


def test_every_internal_page_is_linked() -> None:
    named = set(_paths(CONTRIBUTING.read_text()))
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= named


def test_these_tests_can_fail() -> None:
    assert _paths("`runtime/gone.py` and `Gone.run`, `a -> b`, `docs/`") == ["runtime/gone.py", "docs/"]
    text = "\n## The map\n\n- `a/` (x, y): one, two (z),\n  three\n- `b/`, `c/` (x)\n\n## Next\n- `d/`: x\n"
    assert _map(text) == [("a/", ["one", "two", "three"]), ("b/", []), ("c/", [])]
