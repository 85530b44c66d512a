"""Which tasks deserve a folded session: those that most rows ask for, within a budget.

Pure policy: no clock, no sessions.  `record` is called for every run, `decide` now and then.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["Heat"]

K = TypeVar("K", bound=Hashable)

_LARGEST = 50.0  # windows since the origin, beyond which counts are brought back to a new one


def _one(key: Hashable) -> float:
    """The cost of a session where the budget is a number of sessions."""
    return 1.0


class Heat(Generic[K]):
    """Rates of rows per key, and which keys to fold; safe to use from several threads.

    A run counts fully at first and e times less with every window that passes.  A key that is folded is let go only
    for one that is `margin` times hotter, or when its rate falls `margin` times below the minimum: a fold costs
    seconds, and tasks of similar rate must not take turns.

    Args:
        budget: total cost of all folded sessions: a number of sessions, or bytes.
        cost: key -> what its session costs; by default 1, for a budget in sessions.
        window: seconds.
        minimum: rows per second below which nothing is folded.
        margin: how much hotter a newcomer must be, at least 1.
        most: how many keys are remembered; of more, the coldest half is forgotten.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        budget: float,
        *,
        cost: Callable[[K], float] = _one,
        window: float = 60.0,
        minimum: float = 1.0,
        margin: float = 1.5,
        most: int = 10_000,
    ) -> None:
        if budget < 0 or window <= 0 or minimum <= 0 or margin < 1 or most < 2:
            raise ValueError("budget >= 0, window > 0, minimum > 0, margin >= 1 and most >= 2")
        self._budget, self._cost, self._window = budget, cost, window
        self._minimum, self._margin, self._most = minimum, margin, most
        # Rows, weighted by exp(time since the origin in windows): later rows weigh more, so old ones need no update.
        self._rows: dict[K, float] = {}
        self._origin: float | None = None
        self._folded: dict[K, None] = {}
        self._pinned: dict[K, None] = {}
        self._refused: set[K] = set()
        self._lock = threading.Lock()

    @property
    def folded(self) -> frozenset[K]:
        """The keys that the last decision wants folded, pinned ones included."""
        with self._lock:
            return frozenset(self._folded)

    def record(self, key: K, rows: float, now: float) -> None:
        """Count the rows of one run.

        Args:
            key: key of the rows.
            rows: how many.
            now: seconds on the caller's monotonic clock.
        """
        with self._lock:
            if self._origin is None:
                self._origin = now
            age = (now - self._origin) / self._window
            if age > _LARGEST:
                self._rebase(now)
                age = 0.0
            counts = self._rows
            counts[key] = counts.get(key, 0.0) + rows * math.exp(age)
            if len(counts) > self._most:
                self._shrink()

    def rate(self, key: K, now: float) -> float:
        """Rows per second of a key."""
        with self._lock:
            return self._rows.get(key, 0.0) * self._scale(now)

    def pin(self, key: K) -> None:
        """Keep a key folded, whatever its rate and the budget; what it costs is not there for others."""
        with self._lock:
            self._pinned[key] = None
            self._refused.discard(key)

    def unpin(self, key: K) -> None:
        """Leave a key to its rate again."""
        with self._lock:
            self._pinned.pop(key, None)

    def refuse(self, key: K) -> None:
        """Say that a key cannot be folded: it is not asked for again, until it is pinned or forgotten."""
        with self._lock:
            self._drop(key)
            self._refused.add(key)

    def forget(self, key: K) -> None:
        """Drop all that is known of a key after its adapter left or was replaced; the caller closes the session."""
        with self._lock:
            self._drop(key)
            self._refused.discard(key)
            self._rows.pop(key, None)

    def decide(self, now: float) -> tuple[list[K], list[K]]:
        """What to change; the next decision takes it for done, unless `refuse` or `forget` says otherwise.

        Args:
            now: seconds on the clock of `record`.

        Returns:
            Keys to fold, the hottest first, and keys to unfold, which make room for them.
        """
        with self._lock:
            wanted = self._choose(self._scale(now))
            fold = [key for key in wanted if key not in self._folded]
            unfold = [key for key in self._folded if key not in wanted]
            self._folded = wanted
            return fold, unfold

    def _choose(self, scale: float) -> dict[K, None]:
        room = self._budget - self._total(self._pinned)
        heats = []
        for place, (key, rows) in enumerate(self._rows.items()):
            heat = rows * scale * (self._margin if key in self._folded else 1.0)
            if heat >= self._minimum and key not in self._pinned and key not in self._refused:
                # The hottest first; of equals those that are folded, then the first seen.
                heats.append((-heat, key not in self._folded, place, key))
        chosen = dict(self._pinned)
        heats.sort(key=lambda entry: entry[:3])
        for *_, key in heats:
            cost = self._cost(key)
            if cost <= room:
                room -= cost
                chosen[key] = None
        return chosen

    def _total(self, keys: Iterable[K]) -> float:
        return sum(self._cost(key) for key in keys)

    def _drop(self, key: K) -> None:
        self._folded.pop(key, None)
        self._pinned.pop(key, None)

    def _scale(self, now: float) -> float:
        """What turns a count into rows per second."""
        if self._origin is None:
            return 0.0
        return math.exp((self._origin - now) / self._window) / self._window

    def _rebase(self, now: float) -> None:
        factor = self._scale(now) * self._window
        self._rows = {key: rows * factor for key, rows in self._rows.items()}
        self._origin = now

    def _shrink(self) -> None:
        """Keep the hotter half, and what is folded: amortised, this is constant per record."""
        kept = sorted(self._rows, key=self._rows.__getitem__, reverse=True)[: self._most // 2]
        held = {*kept, *(key for key in self._folded if key in self._rows)}
        self._rows = {key: rows for key, rows in self._rows.items() if key in held}
