"""How often a key may change what is registered: each change is written to disk and to the audit log."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from tpeft_deploy.errors import QuotaExceeded

__all__ = ["ChangeRate"]

_BURST_SECONDS = 10.0
_KEYS = 10_000


class ChangeRate:
    """A token bucket for each key.  Belongs to one thread: the event loop's.

    Args:
        per_second: changes; a burst of ten seconds' worth may come at once.  None is no limit.
        clock: seconds that do not run backwards.
    """

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_second
        self._clock = clock
        self._full: OrderedDict[str, float] = OrderedDict()  # key -> when its bucket is full again

    def spend(self, key: str) -> None:
        """Take one change from a key's bucket.

        Raises:
            QuotaExceeded: with the seconds after which it is allowed.
        """
        if self._rate is None:
            return
        now, each = self._clock(), 1 / self._rate
        full = max(now, self._full.get(key, now)) + each
        wait = full - now - max(_BURST_SECONDS, each)
        if wait > 1e-9:
            raise QuotaExceeded(
                "change what is registered",
                expected=f"at most {self._rate:g} changes a second with one key",
                got="more",
                fix=f"Send it again in {wait:.3g} s.",
                retry_after=wait,
            )
        self._full[key] = full
        self._full.move_to_end(key)
        while len(self._full) > _KEYS:
            self._full.popitem(last=False)
