"""Which adapter gives its row to another: the least used of those that were not used for longest.

Where few adapters get most requests, as is usual, the least recently used one alone is a poor choice: an adapter that
many ask for leaves when enough others are asked for once. The counts of uses decide, as in TinyLFU (Einziger et al.,
2017), among those that recency puts last; they halve after ten uses for each resident, so that what was in demand
earlier does not stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["Used", "UseHistory"]

_LOOKED = 256  # of the least recently used
_USES = 10  # for each resident, until counts are halved
_FEWEST = 8  # residents that are counted at least


class Used(Protocol):
    """What has a count of uses; also while it is not resident.

    Attributes:
        heat: count of uses when it was last used.
        epoch: number of halvings by then.
    """

    heat: float
    epoch: int


Item = TypeVar("Item", bound=Used)


class UseHistory:
    """Counts of uses, halved from time to time."""

    def __init__(self) -> None:
        self._epoch = 0
        self._uses = 0  # since the last halving

    def add(self, item: Used, residents: int) -> None:
        """Count a use.

        Args:
            item: the one in use.
            residents: number of those that are resident.
        """
        item.heat, item.epoch = self.heat(item) + 1.0, self._epoch
        self._uses += 1
        if self._uses >= _USES * max(residents, _FEWEST):
            self._uses = 0
            self._epoch += 1

    def heat(self, item: Used) -> float:
        """Return the count of an item's uses, each halved as often as it is old."""
        return item.heat * 0.5 ** (self._epoch - item.epoch)

    def victim(self, items: Iterable[Item]) -> Item | None:
        """Return the one to evict; None if there is none.

        Args:
            items: those that may be evicted, the least recently used first.
        """
        return min(itertools.islice(items, _LOOKED), key=self.heat, default=None)
