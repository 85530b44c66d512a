"""Imports modules one after another, and prints a JSON object before and after each.

Run as a child process: a compiled module may crash it.
"""

from __future__ import annotations

import importlib
import json
import sys

from tpeft_deploy.errors import brief


def main() -> None:
    """Import the modules that the arguments name."""
    for name in sys.argv[1:]:
        print(json.dumps({"begin": name}), flush=True)
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            print(json.dumps({"module": name, "error": brief(reason)}), flush=True)
        else:
            print(json.dumps({"module": name, "error": None}), flush=True)


if __name__ == "__main__":
    main()
