"""Which adapter gives its row to another."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from benchmarks.scale_simulation import belady
from tpeft_deploy.runtime.adapters.eviction import UseHistory


@dataclass
class Item:
    name: str = ""
    heat: float = 0.0
    epoch: int = 0


def test_the_least_used_of_the_least_recently_used_leaves() -> None:
    uses, items = UseHistory(), [Item("often"), Item("once"), Item("never"), Item("recent")]
    for item, count in zip(items, (5, 1, 0, 1), strict=True):
        for _ in range(count):
            uses.add(item, 4)
    assert uses.victim(items) is items[2]
    assert uses.victim([items[0], items[1], items[3]]) is items[1]
    assert uses.victim(items[:1]) is items[0]
    assert uses.victim([]) is None


def test_equals_leave_in_the_order_of_their_last_use() -> None:
    items = [Item(str(index)) for index in range(100)]
    uses = UseHistory()
    for item in items:
        uses.add(item, 1000)
    assert uses.victim(items) is items[0]


def test_earlier_uses_count_less_and_less() -> None:
    uses, before, now = UseHistory(), Item(), Item()
    for _ in range(64):
        uses.add(before, 8)
    for _ in range(800):
        uses.add(now, 8)
    assert uses.heat(before) < 0.1
    assert 80 <= uses.heat(now) < 240  # all but those of the last halvings are gone
    assert uses.victim([now, before]) is before


def test_more_rows_are_found_resident_than_with_recency_alone() -> None:
    draw = np.random.default_rng(0)
    weights = np.cumsum(1.0 / np.arange(1, 2001))
    asked = [str(rank) for rank in np.searchsorted(weights, draw.uniform(0, weights[-1], 30_000))]
    best = belady(asked, 200, 0)
    assert played(asked, 200, UseHistory()) > 0.89 * best
    assert played(asked, 200, None) < 0.80 * best


def played(asked: list[str], rows: int, uses: UseHistory | None) -> int:
    """Hits of a bank; with recency alone without a history."""
    bank: OrderedDict[str, Item] = OrderedDict()
    known: dict[str, Item] = {}
    hits = 0
    for name in asked:
        item = known.setdefault(name, Item(name))
        hits += name in bank
        if uses is not None:
            uses.add(item, len(bank))
        if name not in bank and len(bank) >= rows:
            victim = next(iter(bank.values())) if uses is None else uses.victim(bank.values())
            assert victim is not None
            del bank[victim.name]
        bank[name] = item
        bank.move_to_end(name)
    return hits
