"""Measure the project's tables and write them to benchmarks/RESULTS.md, results.json and results.html.

python -m benchmarks.tables [--only forms,limits] [--full] [--cache DIR] [--threads N] [--seconds S] [--write]

Each table is measured in a separate process.  A table that is not measured keeps its last result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from benchmarks.tables import page, quoted, report
from benchmarks.tables.machine import this_machine
from benchmarks.tables.report import Measured
from benchmarks.tables.table import Settings, Table

PACKAGE = "benchmarks.tables"
# In the order of the page; each is a module with `measure(settings: Settings) -> Table`.
TABLES = tuple(
    name
    for name in ("forms", "peers", "growth", "servers", "tensors", "limits")
    if importlib.util.find_spec(f"{PACKAGE}.{name}") is not None
)
ROOT = Path(__file__).parents[2]
LACKING = 3  # exit code of a child whose table needs a package that is not installed


def measured(name: str, settings: Settings) -> Measured | str:
    """Measure a table in a process.

    Returns:
        The table, or one line about why there is none.
    """
    machine, began = this_machine(), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        into = Path(place) / "table.json"
        options = _options(settings)
        command = [sys.executable, "-m", PACKAGE, "--child", name, "--into", str(into), "--cache", str(settings.cache)]
        threads = str(settings.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            if done.returncode != LACKING:
                sys.stderr.write(done.stderr)
            return lines[-1]
        table = msgspec.json.decode(into.read_bytes(), type=Table)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return Measured(table, machine, date, " ".join(options), round(time.monotonic() - began, 1))


def child(name: str, settings: Settings, into: Path) -> None:
    """Measure a table in this process."""
    try:
        table: Table = importlib.import_module(f"{PACKAGE}.{name}").measure(settings)
    except ModuleNotFoundError as error:
        print(f"package {error.name} is not installed", file=sys.stderr)
        sys.exit(LACKING)
    into.write_bytes(msgspec.json.encode(table))


def write_all(results: dict[str, Measured], folder: Path, quoting: Sequence[Path]) -> None:
    """Write the three files, and the figures that other texts quote."""
    ordered = {name: results[name] for name in (*TABLES, *sorted(set(results) - set(TABLES))) if name in results}
    report.write(folder / "results.json", ordered)
    (folder / "RESULTS.md").write_text(report.markdown(ordered), encoding="utf-8")
    (folder / "results.html").write_text(page.render(ordered), encoding="utf-8")
    for file in quoting:
        text = file.read_text(encoding="utf-8")
        try:
            new = quoted.updated(text, ordered)
        except LookupError as error:  # a table that was never measured here
            print(f"{file.name}: {error}")
            continue
        if new != text:
            file.write_text(new, encoding="utf-8")
            print(f"{file.name}: figures changed")


def _options(settings: Settings) -> list[str]:
    options = ["--threads", str(settings.threads), "--seconds", f"{settings.seconds:g}"]
    return [*options, "--full"] if settings.full else options


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in TABLES]:
        raise argparse.ArgumentTypeError(f"expected names among {', '.join(TABLES)}, got {', '.join(unknown)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=_names, default=list(TABLES), help=f"Names with commas: {', '.join(TABLES)}.")
    parser.add_argument("--full", action="store_true", help="All cases; hours.")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench", help="Where exported bundles are kept.")
    parser.add_argument("--threads", type=int, default=1, help="Intra-op threads of each session.")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="For the rounds of one comparison; at least 5 rounds."
    )
    parser.add_argument("--write", action="store_true", help="Measure nothing; write the pages from results.json.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.cache.resolve(), options.threads, options.seconds, options.full)
    if options.child is not None:
        child(options.child, settings, options.into)
        return
    folder = ROOT / "benchmarks"
    if options.write:
        write_all(report.read(folder / "results.json"), folder, [ROOT / "README.md"])
        return
    failed = []
    for name in options.only:
        print(f"{name} ...", flush=True)
        found = measured(name, settings)
        if isinstance(found, str):
            print(f"{name}: not measured: {found}")
            failed.append(name)
            continue
        print(f"{name}: {found.took_s:.0f} s", flush=True)
        # Read again for each table, so that runs beside this one keep theirs.
        write_all(report.read(folder / "results.json") | {name: found}, folder, [ROOT / "README.md"])
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
