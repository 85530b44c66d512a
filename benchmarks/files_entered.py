"""Library files that one call enters, and how often it changes between them.

    python -m benchmarks.files_entered BUNDLE

Counts Python calls in the calling thread and in threads that the call starts.  `entered` traces any other call.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import tpeft_deploy
from tpeft_deploy import Runtime
from tpeft_deploy.bundle.directory import Bundle

__all__ = ["Entered", "entered"]

# Installed as links into the repository: a file is counted by the path behind the link.
LIBRARY = Path(tpeft_deploy.__file__).resolve().parents[1]
FOLDERS = tuple(str(LIBRARY / folder) + "/" for folder in ("tpeft_deploy", "runtime", "exporters"))


@dataclass
class Entered:
    """What a call entered.

    Attributes:
        calls: library file -> functions of it that were called.
        changes: calls and returns that led from one library file to another.
    """

    calls: Counter[str] = field(default_factory=Counter)
    changes: int = 0

    def __str__(self) -> str:
        files = "".join(f"\n{count:6} {file}" for file, count in sorted(self.calls.items()))
        return f"{len(self.calls)} files, {sum(self.calls.values())} calls, {self.changes} changes of file{files}"


def entered(call: Callable[[], object], *, warm: int = 3) -> Entered:
    """Trace one call, in the calling thread and in threads that it starts.

    Args:
        call: function to trace.
        warm: number of calls before the traced one, so that caches are filled.
    """
    found = Entered()
    last: dict[int, str] = {}
    names: dict[str, str | None] = {}

    def library_file(frame: FrameType | None) -> str | None:
        if frame is None:
            return None
        name = frame.f_code.co_filename
        if name not in names:
            path = str(Path(name).resolve())
            names[name] = str(Path(path).relative_to(LIBRARY)) if path.startswith(FOLDERS) else None
        return names[name]

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return"):
            return
        file = library_file(frame if event == "call" else frame.f_back)
        if event == "call" and file is not None:
            found.calls[file] += 1
        if file is not None:
            thread = threading.get_ident()
            found.changes += last.setdefault(thread, file) != file
            last[thread] = file

    for _ in range(warm):
        call()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def main() -> None:
    """Print what one `Runtime.run` enters: one task, the base, and a task for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    inputs = Bundle.open(options.bundle).example()
    rows = len(next(iter(inputs.values())))
    with Runtime(options.bundle, provider="cpu", threads=1) as runtime:
        names = [*runtime.tasks, "base"]
        mixed = [names[row % len(names)] for row in range(rows)]
        for title, call in {
            "one task": lambda: runtime.run(inputs, names[0]),
            "base": lambda: runtime.run(inputs),
            "a task for each row": lambda: runtime.run(inputs, tasks=mixed),
        }.items():
            print(f"{title}: {entered(call)}")


if __name__ == "__main__":
    main()
