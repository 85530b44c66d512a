"""One name, one meaning: no public class of the library shares its name with another class or type."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_public_classes_have_distinct_names() -> None:
    homes, aliases = defaultdict(set), defaultdict(set)
    for folder in ("tpeft_deploy", "exporters", "runtime"):
        for file in (ROOT / folder).rglob("*.py"):
            place = str(file.resolve().relative_to(ROOT))
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].add(place)
                elif isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):  # but type variables
                    aliases[ast.unparse(node.targets[0])].add(place)
    repeated = {name: sorted(files) for name, files in homes.items() if len(files | aliases[name]) > 1}
    assert len(homes) > 300
    assert not repeated, f"one name for several classes, or for a class and another type: {repeated}"
