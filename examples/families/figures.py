"""Figures of the families of models: what export, serving and generation cost, as JSON and as a table.

Each example of this folder runs small by default, and in the real configuration with `--full`; the results of full runs
are in `results/`, and docs/families shows them.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpeft_deploy import Bundle
from tpeft_deploy.runtime.bench.bundled import bench_bundle
from tpeft_deploy.runtime.bench.measure import resident_bytes

__all__ = ["Measured", "forms", "gate", "measuring", "options", "record", "table"]

RESULTS = Path(__file__).parent / "results"


@dataclass
class Measured:
    """Costs of a block of code.

    Attributes:
        seconds: time that it took.
        megabytes: largest memory of the process meanwhile, less that before.
    """

    seconds: float = 0.0
    megabytes: float = 0.0


def options(description: str | None) -> argparse.Namespace:
    """Read the command line: `full`, and `out`, a directory to work in."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the real configuration")
    parser.add_argument("--out", type=Path, required=True, help="directory for the models and the bundle")
    return parser.parse_args()


@contextmanager
def measuring() -> Iterator[Measured]:
    """Measure the block, such as an export."""
    found, before, done = Measured(), resident_bytes() or 0, threading.Event()
    peak = [before]

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(max(peak.pop(), resident_bytes() or 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        found.megabytes = (peak[0] - before) / 2**20


def gate(bundle: Bundle) -> dict[str, float]:
    """Return the largest relative error of each form that the export measured, over tasks, shapes and components."""
    found: dict[str, float] = {}
    for part in bundle.components.values():
        for check in part.manifest.gate:
            found[check["form"]] = max(found.get(check["form"], 0.0), check["error"])
    return found


def forms(bundle: Bundle, rows: Sequence[int], seconds: float, threads: int = 2) -> list[dict[str, Any]]:
    """Return milliseconds of a batch in each form, and the ratio to the plain base, medians of interleaved rounds."""
    found = bench_bundle(bundle, provider="cpu", rows=rows, seconds=seconds, threads=threads)
    return [
        {"form": cost.case, "rows": cost.rows, "ms": cost.ms.median, "ratio": cost.ratio.median} for cost in found.cases
    ]


def record(name: str, figures: Mapping[str, Any], full: bool) -> None:
    """Print the figures, and keep those of the real configuration for the docs."""
    print(table(figures))
    if full:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def table(figures: Mapping[str, Any]) -> str:
    """Render figures as Markdown: a row each, and a table for each list of rows with names."""
    plain = {name: value for name, value in figures.items() if not isinstance(value, list)}
    parts = ["\n".join(["| | |", "|---|---|", *(f"| {name} | {_shown(value)} |" for name, value in plain.items())])]
    for name, rows in figures.items():
        if isinstance(rows, list):
            head = list(rows[0])
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [f"| {' | '.join(_shown(row[column]) for column in head)} |" for row in rows]
            parts.append(f"{name}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(own)}" for name, own in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
