"""What every table of `make bench` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tpeft_deploy.runtime.bench.measure import Case, interleave, spread
from tpeft_deploy.runtime.bench.results import Spread

__all__ = ["Row", "Settings", "Table", "race"]

Figure = float | int | str | Spread | None


@dataclass(frozen=True)
class Settings:
    """What a table may use.

    Args:
        cache: directory in which exported bundles and models stay between runs.
        threads: intra-op threads of each session.
        seconds: for the rounds of one comparison.
        full: measure every case; by default a table measures a part that takes minutes.
    """

    cache: Path
    threads: int = 1
    seconds: float = 10.0
    full: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a table: a name and a figure for each column; a column that does not apply has None."""

    name: str
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class Table:
    """A table and what is needed to read it.

    Args:
        name: key by which the command line and the JSON file select it: letters, digits and "-".
        title: heading.
        text: plain English paragraphs: the work, the unit of each column, what was checked to be equal.
        columns: names of columns, in order, with units: "ms", "ratio", "MB".
        rows: lines in the order in which they are shown.
        losses: name of a row in which this toolkit is behind -> the reason.
    """

    name: str
    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    losses: Mapping[str, str] = field(default_factory=dict)


def race(cases: Mapping[str, Case], seconds: float, reference: str) -> dict[str, dict[str, Figure]]:
    """Time cases in turns, and compare each with one of them.

    Args:
        cases: name -> what to time; all have been found to give equal answers before.
        seconds: for all rounds together.
        reference: name of the case that ratios divide by.

    Returns:
        Name -> "ms" (median and quartiles) and "ratio": those of the ratios within a round.
    """
    times = interleave(cases, seconds)
    return {
        name: {
            "ms": spread([1000 * each for each in own]),
            "ratio": spread([mine / other for mine, other in zip(own, times[reference], strict=True)]),
        }
        for name, own in times.items()
    }
