"""Rate limit of registry changes per key, as each change is written to disk and to the audit log."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from tpeft_deploy.errors import QuotaExceeded

__all__ = ["ChangeRate"]

_BURST_SECONDS = 10.0
_KEYS = 10_000


class ChangeRate:
    """Token bucket per key; not thread-safe, used on the event loop only.

    Args:
        per_second: changes per second, with bursts of ten seconds' worth; None means no limit.
        clock: monotonic clock in seconds.
    """

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_second
        self._clock = clock
        self._full: OrderedDict[str, float] = OrderedDict()  # key -> time at which its bucket is full

    def spend(self, key: str) -> None:
        """Spend one change of a key.

        Raises:
            QuotaExceeded: the bucket is empty; `retry_after` is the time until the change is allowed.
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
