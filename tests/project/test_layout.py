"""Tests lie where their modules lie: a test of one module has the module's name, in the folder of the same name."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = {"exporters": ROOT / "exporters", "runtime": ROOT / "runtime", "server": ROOT / "runtime" / "server"}


def _mirrored(folder: Path) -> Path | None:
    """The folder of the library that a folder of tests mirrors; None where tests of several modules lie together."""
    first, *rest = folder.relative_to(ROOT / "tests").parts or ("",)
    place = LIBRARY.get(first, ROOT / "tpeft_deploy" / first).joinpath(*rest)
    return place if (place / "__init__.py").is_file() else None


def test_a_test_in_a_mirrored_folder_has_the_name_of_a_module_there() -> None:
    strays, mirrored = [], 0
    for file in (ROOT / "tests").rglob("test_*.py"):
        place = _mirrored(file.parent)
        if place is None:
            continue
        mirrored += 1
        name = file.stem.removeprefix("test_")
        if not ((place / f"{name}.py").is_file() or (place / name).is_dir() or name == place.name):
            strays.append(str(file.relative_to(ROOT)))
    assert mirrored > 80
    assert not strays, (
        f"no modules of these names; tests of several modules have folders named for what they prove: {strays}"
    )


def test_helpers_lie_apart_from_tests() -> None:
    found = (ROOT / "tests").rglob("*.py")
    others = {f for f in found if not f.name.startswith("test_") and f.name != "conftest.py"}
    apart = {ROOT / "tests" / "helpers", ROOT / "tests" / "cuda_stub"}
    strays = sorted(str(f.relative_to(ROOT)) for f in others if not apart & set(f.parents))
    assert not strays, f"helpers belong in tests/helpers: {strays}"


def test_no_module_imports_from_a_test() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if name.startswith(("tests.", "test_")) and name.rpartition(".")[2].startswith("test_")
    ]
    assert not found, f"code that several tests use belongs in tests/helpers: {found}"
