"""Inputs of a graph that hold the slots of many targets, so that a run picks its adapters by few operators.

A GPU spends more time on starting the two products of a low-rank branch than on computing them.  The packed form of a
banked graph therefore takes the down factors of targets that read the same activation (q, k and v of an attention) as
one matrix, and stacks matrices of equal sizes, so that one Gather per stack picks the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpeft_deploy.tucker import Array

__all__ = ["Packed", "pack", "packed_of", "with_one_rank"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One input of a packed graph; a row of it is (S, G, R, size), with one rank R for all inputs.

    Args:
        name: name of the graph input.
        members: S groups of G names of inputs of the portable graph, whose slots stand in this order.
        turned: whether a slot is (size, R) in the portable graph; otherwise (R, size).
    """

    name: str
    members: tuple[tuple[str, ...], ...]
    turned: bool


def packed_of(entry: Mapping[str, Any]) -> Packed:
    """Read what the manifest says of one input."""
    members = tuple(tuple(map(str, group)) for group in entry["members"])
    return Packed(str(entry["name"]), members, bool(entry["turned"]))


def pack(packing: Sequence[Packed], rows: Mapping[str, Array], defaults: Mapping[str, Array]) -> dict[str, Array]:
    """Put slots into the inputs of a packed graph; what is not packed stays as it is.

    Args:
        packing: inputs of the packed graph.
        rows: input of the portable graph -> slot, (R, size) or (size, R), each with a rank R of its own.
        defaults: the same for the slots that `rows` leaves out.

    Returns:
        Input of the packed graph -> (S, G, R, size), zero-padded to the largest rank; an input none of whose members
        is among `rows` is left out.
    """
    left, found = dict(rows), dict[str, list[Array]]()
    for own in packing:
        names = [name for group in own.members for name in group]
        if any(name in rows for name in names):
            slots = [left.pop(name) if name in left else defaults[name] for name in names]
            found[own.name] = [slot.T for slot in slots] if own.turned else slots
    rank = max((len(slot) for slots in found.values() for slot in slots), default=0)
    for own in packing:
        if slots := found.get(own.name, []):
            stacked = np.zeros((len(slots), rank, slots[0].shape[1]), slots[0].dtype)
            for place, slot in enumerate(slots):
                stacked[place, : len(slot)] = slot
            left[own.name] = stacked.reshape(len(own.members), len(own.members[0]), *stacked.shape[1:])
    return left


def with_one_rank(packing: Sequence[Packed], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of rows, those of all packed inputs widened to the largest rank among them."""
    rank = max((shapes[own.name][2] for own in packing), default=0)
    return dict(shapes) | {own.name: (*shapes[own.name][:2], rank, shapes[own.name][3]) for own in packing}
