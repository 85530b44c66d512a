"""What a process knows of the replicas: their load and adapters; it chooses among them by `placement`."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.runtime.cluster.placement import AffinePlacement, PlacementCosts, RowsPart
from tpeft_deploy.runtime.cluster.wire import Figures

__all__ = ["ReplicaTable", "short_digest", "table_of"]

_SENT = 1 << 16  # adapters of a replica that are taken for resident because rows of theirs were sent


def short_digest(digest: str) -> bytes:
    """Return the first 8 bytes of a digest, by which replicas report it."""
    return bytes.fromhex(digest[:16])


class ReplicaTable:
    """The replicas of a deployment; thread-safe.

    Args:
        costs: costs and bounds of the placement.
        clock: clock in seconds.

    Attributes:
        on_change: called after replicas have come or gone, outside the lock.
    """

    def __init__(self, costs: PlacementCosts | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._placement = AffinePlacement(costs)
        self._clock = clock
        self._lock = threading.Lock()
        self._figures: dict[str, Figures] = {}
        self._sent: dict[str, _Sent] = {}
        self._running: Counter[str] = Counter()  # rows that this process waits for
        self.on_change: Callable[[], None] = lambda: None

    def update(self, replicas: Mapping[str, Figures | None]) -> None:
        """Take over the replicas that take calls.

        Args:
            replicas: name -> its figures; None before its first ones.
        """
        with self._lock:
            changed = set(replicas) != set(self._placement.replicas)
            self._placement.update(dict.fromkeys(replicas, 1.0))
            self._sent = {name: self._sent.get(name) or _Sent() for name in replicas}
            for name, own in replicas.items():
                if own is not None and own != self._figures.get(name):
                    self._sent[name].reported()
            self._figures = {name: own or self._figures.get(name, Figures()) for name, own in replicas.items()}
        if changed:
            self.on_change()

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of the replicas."""
        with self._lock:
            return self._placement.replicas

    def figures(self) -> list[Figures]:
        """Return the last figures of each replica that has reported some."""
        with self._lock:
            return [own for own in self._figures.values() if own.usage]

    def choose(self, digest: str, rows: int, avoid: str | None = None) -> str | None:
        """Return the replica for rows of one adapter, and count them as demand; None where there is none.

        Args:
            digest: digest of the adapter; "base" for the base, which every replica has.
            rows: number of rows.
            avoid: name of a replica that is not taken while there is another.
        """
        with self._lock:
            load = self._load()
            if not load:
                return None
            others = [name for name in load if name != avoid] or [*load]
            if avoid is not None or digest == BASE_TASK:
                return min(others, key=lambda name: load[name])
            name = self._placement.choose(digest, load, self._is_resident)
            self._placement.record(digest, name, rows, self._clock())
            return name

    def split(self, digests: Sequence[str]) -> list[RowsPart]:
        """Return the parts of a request of several adapters, and count them as demand.

        Raises:
            LookupError: there is no replica.
        """
        with self._lock:
            now = self._clock()
            parts = self._placement.split(digests, self._load(), self._is_resident)
            for part in parts:
                for digest, rows in Counter(digests[row] for row in part.rows).items():
                    if digest != BASE_TASK:
                        self._placement.record(digest, part.replica, rows, now)
            return parts

    def preferred(self, digest: str, least: int = 1) -> list[str]:
        """Return the replicas that an adapter belongs to, at least `least` where there are as many."""
        with self._lock:
            if not self._placement.replicas:
                return []
            return self._placement.preferred(digest, max(least, self._placement.copies(digest)))

    def resident(self, digest: str) -> bool:
        """Whether any replica has an adapter on the device, as far as is known."""
        with self._lock:
            return any(self._is_resident(name, digest) for name in self._placement.replicas)

    def hottest(self) -> list[str]:
        """Return adapters in demand, those with most of it first."""
        with self._lock:
            return self._placement.demand.hottest()

    @contextmanager
    def running(self, replica: str | None, digests: Sequence[str], rows: int) -> Iterator[None]:
        """Count rows as load of a replica during the block, and their adapters as resident there until it reports."""
        if replica is None:
            yield
            return
        with self._lock:
            self._running[replica] += rows
            if replica in self._sent:  # it may have gone
                self._sent[replica].add(digests)
        try:
            yield
        finally:
            with self._lock:
                self._running[replica] -= rows
                if self._running[replica] <= 0:
                    del self._running[replica]

    def _load(self) -> dict[str, float]:
        """Rows that wait or run, by the larger of what this process sent and what the replica last said."""
        return {name: float(max(self._running[name], own.rows)) for name, own in self._figures.items()}

    def _is_resident(self, replica: str, digest: str) -> bool:
        if digest == BASE_TASK or (replica in self._sent and digest in self._sent[replica]):
            return True
        figures = self._figures.get(replica)
        return figures is not None and short_digest(digest) in figures.resident


class _Sent:
    """Adapters that a replica was asked for and has not reported on yet."""

    def __init__(self) -> None:
        self._before: set[str] = set()  # since the report before the last: the last may have been written before
        self._now: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._now or digest in self._before

    def add(self, digests: Sequence[str]) -> None:
        self._now.update(digests)
        if len(self._now) > _SENT:
            self.reported()

    def reported(self) -> None:
        """Forget what the replica was asked for before its last report but one: it says what is resident."""
        self._before, self._now = self._now, set()


_tables: dict[str, ReplicaTable] = {}
_guard = threading.Lock()


def table_of(deployment: str) -> ReplicaTable:
    """Return the table of a deployment: the one of this process, which its router fills.

    Args:
        deployment: name of the deployment, with that of its application.
    """
    with _guard:
        return _tables.setdefault(deployment, ReplicaTable())
