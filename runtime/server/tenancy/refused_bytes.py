"""Backpressure on tenants for the bytes of their refused messages, as receiving them was wasted work."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from tpeft_deploy.errors import QuotaExceeded

__all__ = ["RefusedBytes"]

_RATE = 64 << 20  # bytes per second
_KEPT = 64  # tenants before expired debts are removed
_LONGEST = 5.0  # seconds before messages are refused
_APART = 0.02


class RefusedBytes:
    """Debts of tenants in seconds; not thread-safe, used on the event loop only.

    Args:
        clock: monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def charge(self, tenant: str, size: int) -> None:
        """Charge a tenant for a received and refused message.

        Args:
            tenant: tenant that sent the message.
            size: size of the message in bytes.
        """
        now = self._clock()
        if len(self._until) >= _KEPT:
            self._until = {own: until for own, until in self._until.items() if until > now}
        self._until[tenant] = max(self._until.get(tenant, now), now) + size / _RATE

    def wait(self, tenant: str) -> float:
        """Return the seconds until a tenant's next message may be received; concurrent calls get increasing times.

        Raises:
            QuotaExceeded: the debt is too large to wait for.
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
