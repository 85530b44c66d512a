"""What numbers of instructions say beside stored ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MARGIN = 0.03
REFERENCE_MARGIN = 0.01
"""The reference has nothing of this package: where it differs by more, all else may differ for the same reason."""


@dataclass(frozen=True)
class Measured:
    """Instructions of one repetition of each path, and where they were counted.

    Attributes:
        environment: facts without which counts cannot be compared, such as the version of Python.
        reference: instructions of the reference path.
        counts: path -> instructions.
    """

    environment: Mapping[str, str]
    reference: float
    counts: Mapping[str, float]


@dataclass
class Verdict:
    """The result of a comparison.

    Attributes:
        inapplicable: why the stored counts do not apply here; empty where they do.
        dearer: paths above the margin; the check fails.
        cheaper: paths below the margin, and paths of one side only; the stored counts should be renewed.
        table: lines to print.
    """

    inapplicable: str = ""
    dearer: list[str] = field(default_factory=list)
    cheaper: list[str] = field(default_factory=list)
    table: list[str] = field(default_factory=list)


def compare(stored: Measured | None, now: Measured) -> Verdict:
    """Compare counts with stored ones; those of another environment are shown and fail nothing."""
    verdict = Verdict(inapplicable=_difference(stored, now))
    before = {} if stored is None else stored.counts
    for name in sorted({*before, *now.counts}):
        if name not in before or name not in now.counts:
            verdict.cheaper.append(name)
            side = "not stored" if name in now.counts else "no longer there"
            verdict.table.append(f"{name:36} {now.counts.get(name, 0):12,.0f}  {side}")
            continue
        change = now.counts[name] / before[name] - 1
        verdict.table.append(f"{name:36} {now.counts[name]:12,.0f}  {change:+7.2%}")
        if change > MARGIN:
            verdict.dearer.append(name)
        elif change < -MARGIN:
            verdict.cheaper.append(name)
    return verdict


def _difference(stored: Measured | None, now: Measured) -> str:
    if stored is None:
        return "none are stored for this tool"
    for fact in sorted({*stored.environment, *now.environment}):
        there, here = stored.environment.get(fact, "none"), now.environment.get(fact, "none")
        if there != here:
            return f"they are of {fact} {there}, this is {here}"
    change = now.reference / stored.reference - 1
    if abs(change) > REFERENCE_MARGIN:
        return f"code outside this package takes {change:+.1%} instructions: other builds of Python or libraries"
    return ""
