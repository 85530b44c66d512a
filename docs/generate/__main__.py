"""Write the generated pages of docs/reference: `python -m docs.generate [PAGE ...]`, all but the zoo by default."""

from __future__ import annotations

import sys
from importlib import import_module

from docs.generate.markdown import ROOT

PAGES = ("errors", "finder", "manifest", "metrics", "settings")


def main() -> None:
    """Write the pages named on the command line."""
    for name in sys.argv[1:] or PAGES:
        text = import_module(f"docs.generate.{name}").page()
        (ROOT / "docs" / "reference" / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
