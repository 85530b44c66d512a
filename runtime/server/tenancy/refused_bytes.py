"""Time that a tenant waits for the bytes of its refused messages: receiving them was work for nothing."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from tpeft_deploy.errors import QuotaExceeded

__all__ = ["RefusedBytes"]

_RATE = 64 << 20  # bytes a second
_KEPT = 64  # tenants
_LONGEST = 5.0  # seconds
_APART = 0.02


class RefusedBytes:
    """Debts of tenants, in seconds.  Belongs to one thread: the event loop's.

    Args:
        clock: time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def charge(self, tenant: str, size: int) -> None:
        """Note a message that was received, and refused.

        Args:
            tenant: sender.
            size: bytes of it.
        """
        now = self._clock()
        if len(self._until) >= _KEPT:
            self._until = {own: until for own, until in self._until.items() if until > now}
        self._until[tenant] = max(self._until.get(tenant, now), now) + size / _RATE

    def wait(self, tenant: str) -> float:
        """Seconds until another message of a tenant may be received; of several that wait, one after the other.

        Raises:
            QuotaExceeded: so many that it should come again.
        """
        if not self._until:
            return 0.0
        seconds = self._until.get(tenant, 0.0) - self._clock()
        if seconds > _LONGEST:
            raise QuotaExceeded(
                f"read a message of tenant {tenant!r}",
                expected="fewer bytes of messages that are refused",
                got="more than this server reads in vain",
                fix="Look at why they were refused.",
                retry_after=seconds,
            )
        if seconds <= 0:
            return 0.0
        self._until[tenant] += _APART
        return seconds
