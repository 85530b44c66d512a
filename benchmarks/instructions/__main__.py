"""Compare numbers of instructions of ten key paths with stored ones (`make bench-check`).

    python -m benchmarks.instructions [--renew] [--profile PATH]

Exit status: 0 nothing is dearer, or the stored counts do not apply here; 1 a path is dearer by more than 3 %;
77 not measured, as there is neither valgrind nor perf.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.instructions import counting
from benchmarks.instructions.comparison import Measured, Verdict, compare
from benchmarks.instructions.paths import PATHS, REFERENCE
from benchmarks.load_adapter import vit_adapter
from benchmarks.server_echo import small
from tpeft_deploy.formats.write import peft_lora

STORED = Path(__file__).parent / "counts.json"
NOT_MEASURED = 77
# Two children at once; as little of the longest as possible in both.
SERVED = [name for name in PATHS if name.startswith(("V2", "key", "infer"))]
OTHERS = [name for name in PATHS if name not in SERVED]


def prepare(place: Path) -> Path:
    """Write what the paths read."""
    place.mkdir()
    small(place / "bundle")
    peft_lora.write(vit_adapter(), place / "peft")
    return place


def environment(tool: str) -> dict[str, str]:
    """Facts without which counts cannot be compared."""
    facts = {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        **{name: version(name) for name in ("numpy", "onnxruntime", "uvloop", "msgspec", "orjson")},
    }
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if tool == "callgrind":
        # It shows programs a processor of its choice, with AVX2 if there is any: what libraries choose kernels by.
        return {**facts, "AVX2": "yes" if re.search(r"^flags\b.* avx2\b", known, re.MULTILINE) else "no"}
    model = re.search(r"^model name\s*: (.*)", known, re.MULTILINE)
    return {**facts, "processor": model[1] if model else "unknown"}


def measure(tool: str) -> Measured:
    with tempfile.TemporaryDirectory(prefix="instructions-") as top, ThreadPoolExecutor(2) as pool:
        count = counting.by_callgrind if tool == "callgrind" else counting.by_perf
        places = [prepare(Path(top) / part) for part in ("a", "b")]
        found: dict[str, float] = {}
        for own in pool.map(count, places, (SERVED, OTHERS)):
            found |= own
    return Measured(environment(tool), found.pop(REFERENCE), found)


def stored_counts() -> dict[str, Measured]:
    """Counts by tool."""
    if not STORED.exists():
        return {}
    return {tool: Measured(**own) for tool, own in json.loads(STORED.read_text()).items()}


def store(tool: str, now: Measured) -> None:
    rounded = Measured(now.environment, round(now.reference), {name: round(own) for name, own in now.counts.items()})
    found = {**stored_counts(), tool: rounded}
    STORED.write_text(json.dumps({name: asdict(own) for name, own in found.items()}, indent=2) + "\n")


def told(verdict: Verdict) -> int:
    """Print a verdict; returns the exit status."""
    print(*verdict.table, sep="\n")
    if verdict.inapplicable:
        print(f"bench-check: the stored counts do not apply, nothing is compared: {verdict.inapplicable}")
        return 0
    if verdict.cheaper:
        print(f"bench-check: renew the stored counts with `make bench-check RENEW=1`: {', '.join(verdict.cheaper)}")
    if verdict.dearer:
        fix = "Make them cheaper (--profile PATH shows where), or, if it must be so, `make bench-check RENEW=1`."
        print(f"bench-check: more than 3 % dearer than stored: {', '.join(verdict.dearer)}. {fix}", file=sys.stderr)
    return int(bool(verdict.dearer))


def profile(name: str) -> None:
    """Print the ten functions that a path spends most in."""
    path, times = PATHS[name]
    with tempfile.TemporaryDirectory() as top, path(prepare(Path(top) / "a")) as repeat:
        repeat(times)
        with cProfile.Profile() as found:
            repeat(times)
    pstats.Stats(found).sort_stats("tottime").print_stats(10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--renew", action="store_true", help="Store the counts.")
    parser.add_argument("--profile", choices=PATHS, metavar="PATH", help="Show where a path spends its time.")
    asked = parser.parse_args()
    if asked.profile:
        profile(asked.profile)
        return 0
    tool = counting.tool()
    if tool is None:
        print(
            "bench-check: not measured: neither valgrind nor perf counts instructions here; apt-get install valgrind",
            file=sys.stderr,
        )
        return NOT_MEASURED
    try:
        now = measure(tool)
    except counting.NotCountedError as error:
        print(f"bench-check: not measured with {tool}: {error}", file=sys.stderr)
        return NOT_MEASURED
    if asked.renew:
        store(tool, now)
    return told(compare(stored_counts().get(tool), now))


if __name__ == "__main__":
    sys.exit(main())
