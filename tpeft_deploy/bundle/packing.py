"""Packed graph inputs: one input holds the slots of many targets, so that a graph needs fewer operators.

On a GPU the kernel launches of a low-rank branch cost more than its two products.  The packed form of a banked graph
therefore concatenates the down factors of targets that read the same activation (q, k and v of an attention) and
stacks matrices of equal sizes, so that one Gather per stack selects the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tpeft_deploy.tucker import Array

__all__ = ["Packed", "pack", "with_one_rank"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One input of a packed graph; a row of it is (S, G, R, size), with one rank R for all inputs.

    Args:
        name: name of the graph input.
        members: S groups of G names of inputs of the portable graph, in the order of their slots.
        turned: True if a slot is (size, R) in the portable graph, False if (R, size).
    """

    name: str
    members: tuple[tuple[str, ...], ...]
    turned: bool


def pack(packing: Sequence[Packed], rows: Mapping[str, Array], defaults: Mapping[str, Array]) -> dict[str, Array]:
    """Convert inputs of the portable graph to those of the packed graph; inputs that are not packed are unchanged.

    Args:
        packing: inputs of the packed graph.
        rows: input of the portable graph -> slot, (R, size) or (size, R); ranks R may differ.
        defaults: slots for the inputs that `rows` leaves out, in the same form.

    Returns:
        Input of the packed graph -> (S, G, R, size), zero-padded to the largest rank.  An input without a member in
        `rows` is left out.
    """
    left, found = dict(rows), dict[str, list[Array]]()
    for packed in packing:
        names = [name for group in packed.members for name in group]
        if any(name in rows for name in names):
            slots = [left.pop(name) if name in left else defaults[name] for name in names]
            found[packed.name] = [slot.T for slot in slots] if packed.turned else slots
    rank = max((len(slot) for slots in found.values() for slot in slots), default=0)
    for packed in packing:
        if slots := found.get(packed.name, []):
            stacked = np.zeros((len(slots), rank, slots[0].shape[1]), slots[0].dtype)
            for place, slot in enumerate(slots):
                stacked[place, : len(slot)] = slot
            left[packed.name] = stacked.reshape(len(packed.members), len(packed.members[0]), *stacked.shape[1:])
    return left


def with_one_rank(packing: Sequence[Packed], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of rows, with the rank of every packed input raised to the largest among them."""
    rank = max((shapes[packed.name][2] for packed in packing), default=0)
    return dict(shapes) | {packed.name: (*shapes[packed.name][:2], rank, shapes[packed.name][3]) for packed in packing}
