"""Torch's random permutations without torch: adapters that record only a seed name positions by them.

`torch.randperm(size, generator=torch.Generator().manual_seed(seed))` on the CPU is a Fisher-Yates shuffle with the
draws of a 32-bit Mersenne Twister, which NumPy has too.  Only the first positions are made: they are final after as
many draws, whatever the size.  From LIMIT on torch shuffles in another order, in which no position is final before all
are made.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.tucker import Array

__all__ = ["LIMIT", "first_of_permutation"]

LIMIT = (2**32 - 1) // 20


def first_of_permutation(seed: int, size: int, count: int) -> Array:
    """The first `count` of torch's random permutation of range(size), int64.

    Args:
        seed: seed of torch's generator.
        size: number of positions, below LIMIT.
        count: at most `size`.
    """
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32)
    offsets = draws % np.arange(size, size - count, -1)
    moved: dict[int, int] = {}
    first = np.empty(count, np.int64)
    for place, offset in enumerate(offsets.tolist()):
        taken = place + offset
        first[place] = moved.get(taken, taken)
        moved[taken] = moved.get(place, place)
    return first
