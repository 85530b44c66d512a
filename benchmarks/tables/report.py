"""Measured tables as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.tables.machine import Machine
from benchmarks.tables.table import Figure, Row, Table
from tpeft_deploy.runtime.bench.results import Spread

__all__ = ["Measured", "markdown", "median", "read", "shown", "write"]

HEAD = """# Results

Written by `make bench`; changes by hand are lost. `benchmarks/results.json` has the same figures, and
`benchmarks/results.html` shows them as plots. A table that the last run did not measure keeps its date and its
machine.

The cases of a table take turns in one process, in another order in each round. A ratio is the median of the ratios
within a round, with its quartiles in parentheses; below 1 means less time than the reference. Equal answers were
checked before anything was timed. Measurements by hand, and what explains them, are in `benchmarks/NOTES.md`.
"""


@dataclass(frozen=True)
class Measured:
    """A table with the circumstances of its measurement.

    Args:
        table: figures.
        machine: hardware and software.
        date: day and time in UTC, "2026-11-28 12:00".
        options: as given on the command line, such as "--threads 1 --seconds 10".
        took_s: seconds that the table took, exports included.
    """

    table: Table
    machine: Machine
    date: str
    options: str
    took_s: float


def read(file: Path) -> dict[str, Measured]:
    """Read tables by name; none if there is no such file.

    Raises:
        msgspec.ValidationError: the file has other contents.
    """
    return msgspec.json.decode(file.read_bytes(), type=dict[str, Measured]) if file.is_file() else {}


def write(file: Path, tables: Mapping[str, Measured]) -> None:
    """Write tables as JSON that `read` reads."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(tables), indent=1) + b"\n")


def median(figure: Figure) -> float | str | None:
    """The number of a figure, a median for a spread."""
    return figure.median if isinstance(figure, Spread) else figure


def shown(figure: Figure) -> str:
    """A figure as text: three digits, and quartiles where there are any."""
    if figure is None:
        return ""
    if isinstance(figure, Spread):
        return f"{_number(figure.median)} ({_number(figure.low)} - {_number(figure.high)})"
    return figure if isinstance(figure, str) else _number(figure)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3}f}"


def markdown(tables: Mapping[str, Measured]) -> str:
    """The page of all tables."""
    return "\n".join([HEAD, *(_section(own) for own in tables.values())])


def _section(own: Measured) -> str:
    table = own.table
    lines = [f"## {table.title}", "", table.text, ""]
    lines += [_line(["", *table.columns]), "|---" * (len(table.columns) + 1) + "|"]
    lines += [_line([row.name, *_cells(table, row)]) for row in table.rows]
    if table.losses:
        lines += ["", "Behind:", "", *(f"- **{name}**: {reason}" for name, reason in table.losses.items())]
    lines += ["", f"{own.date} UTC, `--only {table.name} {own.options}`, {own.took_s:.0f} s. {own.machine.line()}.", ""]
    return "\n".join(lines)


def _cells(table: Table, row: Row) -> list[str]:
    return [shown(row.figures.get(column)) for column in table.columns]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
