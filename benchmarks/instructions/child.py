"""Run some key paths, with a mark before and after the repetitions of each; `counting` counts between the marks.

python -m benchmarks.instructions.child PLACE callgrind|perf PATH...
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.instructions.paths import PATHS

WARM = 16  # repetitions before those that are counted


def callgrind_mark(_switch: str) -> None:
    """Make callgrind write a part: it does so before each call of this function of the C library."""
    os.getppid()


def perf_mark(switch: str) -> None:
    """Switch perf's counter, and wait until it is done."""
    os.write(int(os.environ["PERF_CONTROL"]), f"{switch}\n".encode())
    os.read(int(os.environ["PERF_DONE"]), 16)


MARKS: dict[str, Callable[[str], None]] = {"callgrind": callgrind_mark, "perf": perf_mark}


def main() -> None:
    place, mark = Path(sys.argv[1]), MARKS[sys.argv[2]]
    # Threads take turns where they wait for each other, never by the clock.
    sys.setswitchinterval(1e3)
    for name in sys.argv[3:]:
        path, times = PATHS[name]
        with path(place) as repeat:
            repeat(min(times, WARM))
            gc.collect()
            gc.freeze()
            gc.disable()
            mark("enable")
            repeat(times)
            mark("disable")
            gc.enable()


if __name__ == "__main__":
    main()
