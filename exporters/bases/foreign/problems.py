"""Reasons that a weight of a foreign graph cannot be a target, in the words of the error that it raises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tpeft_deploy.exporters.bases.foreign.initializer_uses import Use

__all__ = ["GIVE_WEIGHTS", "Problem", "ambiguous", "computed", "differs", "disagree", "quantised"]

GIVE_WEIGHTS = "Give the original weights: weights=, or --weights on the command line."


@dataclass(frozen=True)
class Problem:
    """An error's `expected`, `got` and `fix`, and whether the reason is that values differ."""

    expected: str
    got: str
    fix: str
    values_differ: bool = False


def differs(use: Use, digest: str | None) -> Problem:
    """A weight's name stands beside other values than the weight has.

    Args:
        use: place of the weight in the graph.
        digest: digest that adapters recorded; None when the original weights were compared.
    """
    where = f"{use.value.name!r}, where it is used by {use.node.op_type} {use.node.name!r}"
    if digest is None:
        return Problem(
            expected="its own values, or multiples of their rows",
            got=f"other values in {where}",
            fix="The file is of another base, or an optimiser has computed something else into the weight.",
            values_differ=True,
        )
    return Problem(
        expected=f"base weight {digest[:12]}..., as its adapters recorded",
        got=f"other values in {where}",
        fix=f"A norm may be folded into it, or it is another base. {GIVE_WEIGHTS}",
        values_differ=True,
    )


def disagree(use: Use, claims: Mapping[str, Iterable[str]], values: Iterable[str], *, full: bool) -> Problem:
    """An initializer's name, consumers and values that contradict each other.

    Args:
        claims: kind of evidence -> weights that it allows.
        values: the weights that have its values.
        full: whether the original weights are at hand.
    """
    said = [f"its initializer is named {use.value.name!r}"]
    said += [f"{label} says {_few(names)}" for label, names in claims.items() if names]
    said.append(f"its values are those of {_few(values)}" if values else "its values are of none")
    return Problem(
        expected=f"one answer to which weight {use.node.op_type} {use.node.name!r} uses",
        got="; ".join(said),
        fix="Export the file again, or give the module itself." if full else GIVE_WEIGHTS,
    )


def ambiguous(use: Use, names: Iterable[str], why: str, *, full: bool) -> Problem:
    """Several weights may be meant."""
    return Problem(
        expected=f"to know which weight {use.node.op_type} {use.node.name!r} uses",
        got=f"{why} ({use.value.name!r} may be {_few(names)})",
        fix="Give a file exported with optimize=False." if full else GIVE_WEIGHTS,
    )


def computed(use: Use, *, full: bool) -> Problem:
    """A constant may be what an optimiser computed from the weight."""
    return Problem(
        expected="every value near it in the graph to be a weight of the base",
        got=f"{use.value.name!r} of {use.node.op_type} {use.node.name!r}, which may be computed from it",
        fix="Export the file with optimize=False, or without constant folding, or give the module itself."
        if full
        else GIVE_WEIGHTS,
    )


def quantised(op_type: str, node: str, *, full: bool) -> Problem:
    """The weight is held in fewer bits."""
    return Problem(
        expected="a weight in floating point, or a quantised one that its original values identify",
        got=f"one that {op_type} {node!r} holds quantised" + (", unlike any" if full else ""),
        fix="Give the file from before it was quantised." if full else GIVE_WEIGHTS,
    )


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
