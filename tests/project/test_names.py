"""One name, one meaning: no two public classes of the library have the same name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_public_classes_have_distinct_names() -> None:
    homes = defaultdict(set)
    for folder in ("tpeft_deploy", "exporters", "runtime"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].add(str(file.resolve().relative_to(ROOT)))
    repeated = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert len(homes) > 300
    assert not repeated, f"one name for several classes: {repeated}"
