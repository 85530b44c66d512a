"""Figures of the tables that a text quotes.

A figure is marked by a comment behind it, `1.08<!-- bench: TABLE / ROW / COLUMN -->`, and is rounded to the digits that
it has in the text.  `0.81<!-- notes: SECTION -->` is a figure of the section of NOTES.md whose heading begins so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables.report import Measured, median

__all__ = ["MARKED", "NOTES", "noted", "unmarked", "updated"]

NOTES = Path(__file__).parents[1] / "NOTES.md"
MARKED = re.compile(r"(\d+(?:\.(\d+))?)<!-- bench: (.+?) / (.+?) / (.+?) -->")
_NOTED = re.compile(r"(\d+(?:\.\d+)?)<!-- notes: (.+?) -->")
# Numbers with a unit of time, a share, or two decimals.
_FIGURE = re.compile(
    r"(?<![\w.])(?<!Python )(?:\d+(?:\.\d+)? ?(?:%|ms\b|µs\b|us\b|GB/s|times\b|tokens/s|requests/s)|\d\.\d\d)(?![\d.])"
)


def updated(text: str, tables: Mapping[str, Measured]) -> str:
    """Replace each marked figure with that of the tables.

    Raises:
        LookupError: a mark names no number of the tables.
    """

    def figure(found: re.Match[str]) -> str:
        number, digits, *names = found.groups()
        value = _value(tables, *names)
        return found[0].replace(number, f"{value:.{len(digits or '')}f}", 1)

    return MARKED.sub(figure, text)


def _value(tables: Mapping[str, Measured], table: str, row: str, column: str) -> float:
    rows = {own.name: own for own in tables[table].table.rows} if table in tables else {}
    value = median(rows[row].figures.get(column)) if row in rows else None
    if value is None or isinstance(value, str):
        raise LookupError(
            f"cannot quote {table} / {row} / {column}: expected a figure of benchmarks/results.json, got none"
        )
    return value


def noted(text: str, notes: str) -> list[str]:
    """Figures that are marked as those of a section of the notes and do not stand in it."""
    sections = re.split(r"^## ", notes, flags=re.MULTILINE)
    missing = []
    for number, heading in _NOTED.findall(text):
        own = "".join(section for section in sections if section.lstrip("`").startswith(heading))
        if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", own):
            missing.append(f"{number} of {heading}")
    return missing


def unmarked(text: str) -> list[str]:
    """Lines with a figure that looks like one of performance and has no mark; code is left out."""
    prose = re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.sub(r"`[^`\n]*`", "", prose).splitlines()
    return [line for line in lines if _FIGURE.search(_NOTED.sub("", MARKED.sub("", line)))]
