"""Which replica computes the rows of an adapter: a pure policy, used by the router and by its simulation alike.

An adapter belongs to the first few replicas in the order of rendezvous hashing (Thaler and Ravishankar, 1998), so that
every router finds the same ones without asking, and a replica that comes or goes moves only its share. An adapter
in demand belongs to more of them. Among those, the one answers that is expected to be done first; when all of them are
far busier than the mean, the next in the order helps (consistent hashing with bounded loads, Mirrokni et al., 2016).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpeft_deploy.tucker import Array

__all__ = ["Demand", "RowsPart", "AffinePlacement", "PlacementCosts"]

_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64 (Steele et al., 2014)
_ORDERS = 1 << 16  # adapters of which the order of replicas is kept


@dataclass(frozen=True)
class PlacementCosts:
    """Costs and bounds of the policy.

    Attributes:
        miss_rows: cost of loading an adapter, in rows that the replica computes meanwhile.
        part_rows: cost of a further part of a request, in rows.
        filled: share of a replica's work that one adapter may take before it belongs to one more replica.
        work_rows: cost of a replica's work lately, over the mean of all, beside the rows that wait there.
        slack: a replica may have this many times the mean load, and `spare_rows` more, before the next one helps.
        spare_rows: rows that may wait beyond that.
        half_life: seconds in which the measured demand for an adapter halves when none comes.
        adapters: number of adapters of which the demand is measured.
    """

    miss_rows: float = 4.0
    part_rows: float = 4.0
    filled: float = 0.03
    work_rows: float = 8.0
    slack: float = 1.25
    spare_rows: float = 8.0
    half_life: float = 30.0
    adapters: int = 100_000


class Demand:
    """Rows of each adapter in the recent past, each counted less the older it is.

    Args:
        half_life: seconds until a row counts half.
        adapters: number of adapters that are counted; of more, those with the least demand are forgotten.
    """

    def __init__(self, half_life: float, adapters: int) -> None:
        self._decay = math.log(2) / half_life
        self._most = adapters
        self._start: float | None = None
        self._counts: dict[str, float] = {}  # in units that grow with time, so that no count has to be touched
        self._total = 0.0

    def add(self, digest: str, rows: float, now: float) -> None:
        """Count rows of an adapter.

        Args:
            digest: digest of the adapter.
            rows: number of rows.
            now: time of a clock in seconds, the same or later at each call.
        """
        if self._start is None:
            self._start = now
        grown = (now - self._start) * self._decay
        if grown > 500:  # the units come near the limit of a float
            self._rescale(math.exp(-grown))
            self._start, grown = now, 0.0
        amount = rows * math.exp(grown)
        self._counts[digest] = self._counts.get(digest, 0.0) + amount
        self._total += amount
        if len(self._counts) > 2 * self._most:
            self._forget()

    def share(self, digest: str) -> float:
        """Return an adapter's share of all rows, 0 to 1."""
        return self._counts.get(digest, 0.0) / self._total if self._total > 0 else 0.0

    def hottest(self) -> list[str]:
        """Return the digests that are counted, those with most demand first."""
        return sorted(self._counts, key=self._counts.__getitem__, reverse=True)

    def _rescale(self, factor: float) -> None:
        self._counts = {digest: count * factor for digest, count in self._counts.items() if count * factor > 1e-9}
        self._total = sum(self._counts.values())

    def _forget(self) -> None:
        kept = self.hottest()[: self._most]
        self._counts = {digest: self._counts[digest] for digest in kept}
        self._total = sum(self._counts.values())


@dataclass(frozen=True)
class RowsPart:
    """Rows of one request that a replica computes.

    Attributes:
        replica: name of the replica.
        rows: indices of the rows in the request.
    """

    replica: str
    rows: tuple[int, ...]


class AffinePlacement:
    """Chooses replicas; not thread-safe.

    Args:
        costs: costs and bounds of the choice.
    """

    def __init__(self, costs: PlacementCosts | None = None) -> None:
        self._costs = costs or PlacementCosts()
        self.demand = Demand(self._costs.half_life, self._costs.adapters)
        self._work = Demand(self._costs.half_life, 1 << 16)  # of each replica
        self._names: tuple[str, ...] = ()
        self._seeds: Array = np.empty(0, np.uint64)
        self._weights: Array = np.empty(0)
        self._orders: OrderedDict[str, list[str]] = OrderedDict()

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of the replicas."""
        return self._names

    def update(self, weights: Mapping[str, float]) -> None:
        """Set the replicas that take requests.

        Args:
            weights: name of a replica -> its capacity, in any unit, above 0.
        """
        names = tuple(sorted(weights))
        found = np.array([weights[name] for name in names], np.float64)
        if names == self._names and np.array_equal(found, self._weights):
            return
        self._names, self._weights = names, found
        self._seeds = np.array([_number(name) for name in names], np.uint64)
        self._orders.clear()

    def record(self, digest: str, replica: str, rows: float, now: float) -> None:
        """Count rows that a replica was chosen for: towards the adapter's demand, and the replica's work.

        Args:
            digest: digest of the adapter.
            replica: name of the replica.
            rows: number of rows.
            now: time of a clock in seconds, the same or later at each call.
        """
        self.demand.add(digest, rows, now)
        self._work.add(replica, rows, now)

    def copies(self, digest: str) -> int:
        """Return the number of replicas that an adapter belongs to, by its share of the demand."""
        wanted = math.ceil(self.demand.share(digest) * len(self._names) / self._costs.filled)
        return max(1, min(wanted, len(self._names)))

    def preferred(self, digest: str, count: int | None = None) -> list[str]:
        """Return the replicas that an adapter belongs to, in their order.

        Args:
            digest: digest of the adapter.
            count: number of replicas; by default `copies`.
        """
        count = self.copies(digest) if count is None else min(count, len(self._names))
        order = self._orders.get(digest)
        if order is None or len(order) < count:
            order = self._orders[digest] = self._order(digest, max(4, 2 * count))
            if len(self._orders) > _ORDERS:
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end(digest)
        return order[:count]

    def choose(self, digest: str, load: Mapping[str, float], resident: Callable[[str, str], bool]) -> str:
        """Return the replica for rows of one adapter.

        Args:
            digest: digest of the adapter.
            load: name of a replica -> rows that wait or run there.
            resident: function of a replica and a digest: whether the adapter is resident there, as far as is known.

        Raises:
            LookupError: there is no replica.
        """
        if not self._names:
            raise LookupError("no replica")
        count = self.copies(digest)
        bound = self._bound(load)
        while True:
            names = self.preferred(digest, count)
            best = min(names, key=lambda name: self._cost(name, digest, load, resident))
            if load.get(best, 0.0) <= bound or count >= len(self._names):
                return best
            count = min(2 * count, len(self._names))

    def split(
        self, digests: Sequence[str], load: Mapping[str, float], resident: Callable[[str, str], bool]
    ) -> list[RowsPart]:
        """Return the parts of a request of several adapters; one part where that is cheapest.

        Args:
            digests: digest of each row's adapter.
            load: name of a replica -> rows that wait or run there.
            resident: function of a replica and a digest: whether the adapter is resident there, as far as is known.

        Raises:
            LookupError: there is no replica.
        """
        rows = Counter(digests)
        chosen = {digest: self.choose(digest, load, resident) for digest in rows}
        whole = min(sorted(set(chosen.values())), key=lambda name: self._misses(name, rows, resident))
        missed = self._misses(whole, rows, resident)
        apart = sum(not resident(name, digest) for digest, name in chosen.items())
        parts = len(set(chosen.values()))
        costs = self._costs
        if costs.miss_rows * missed <= costs.miss_rows * apart + costs.part_rows * (parts - 1):
            return [RowsPart(whole, tuple(range(len(digests))))]
        found: dict[str, list[int]] = {}
        for row, digest in enumerate(digests):
            found.setdefault(chosen[digest], []).append(row)
        return [RowsPart(name, tuple(own)) for name, own in found.items()]

    def belonging(self, name: str, digests: Iterable[str]) -> list[str]:
        """Return the adapters that belong to a replica, in the order given: what a new one loads before it is ready."""
        return [digest for digest in digests if name in self.preferred(digest)]

    def _cost(self, name: str, digest: str, load: Mapping[str, float], resident: Callable[[str, str], bool]) -> float:
        # Of replicas that are as busy now, the one that has done less: else the first in the order gets most.
        done = self._work.share(name) * len(self._names)
        missed = self._misses(name, [digest], resident)
        return load.get(name, 0.0) + self._costs.work_rows * done + self._costs.miss_rows * missed

    def _bound(self, load: Mapping[str, float]) -> float:
        mean = sum(load.values()) / len(self._names)
        return self._costs.slack * mean + self._costs.spare_rows

    def _misses(self, name: str, digests: Iterable[str], resident: Callable[[str, str], bool]) -> int:
        return sum(not resident(name, digest) for digest in digests)

    def _order(self, digest: str, count: int) -> list[str]:
        """Names of the first `count` replicas of an adapter, by weighted rendezvous hashing."""
        scores = _uniform(self._seeds ^ np.uint64(_number(digest)))
        keys = -self._weights / np.log(scores)  # the largest first, each as often as its weight says
        count = min(count, len(keys))
        first: Any = np.argpartition(-keys, count - 1)[:count] if count < len(keys) else np.arange(len(keys))
        return [self._names[index] for index in first[np.argsort(-keys[first], kind="stable")]]


def _number(name: str) -> int:
    """64 bits of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _uniform(numbers: Array) -> Array:
    """Mix 64-bit numbers to numbers between 0 and 1 (SplitMix64)."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * _MIXERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIXERS[1]
    mixed ^= mixed >> np.uint64(31)
    uniform: Array = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform
