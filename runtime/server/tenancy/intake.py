"""Limits of what requests hold, shared by all protocols: bytes of memory and disk, and concurrency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from tpeft_deploy.errors import QuotaExceeded, TooLarge, Unavailable
from tpeft_deploy.runtime.server.tenancy.refused_bytes import RefusedBytes
from tpeft_deploy.runtime.server.v2.offload import Offload

__all__ = ["ByteBudget", "Concurrency", "Hold", "Intake", "budget_of_bodies"]

_RETRY_SECONDS = 1.0
_GIB = 1 << 30


class ByteBudget:
    """Counts the bytes reserved by all requests and by each tenant; belongs to the event loop's thread.

    Args:
        total: bytes for the server.
        per_tenant: bytes for one tenant (default: half of `total`).
        what: noun for error messages.
    """

    def __init__(self, total: int, per_tenant: int | None = None, what: str = "bytes in flight") -> None:
        self.total = total
        self.per_tenant = min(total, total // 2 if per_tenant is None else per_tenant)
        self._what = what
        self._used = 0
        self._of: dict[str, int] = {}  # only tenants with reservations
        self._lent: dict[Hold, Callable[[], None]] = {}  # reservations that others may reclaim, longest lent first

    @property
    def used(self) -> int:
        """Reserved bytes."""
        return self._used

    def used_by(self, tenant: str) -> int:
        """Return the bytes reserved by a tenant."""
        return self._of.get(tenant, 0)

    def hold(self, tenant: str) -> Hold:
        """Create an empty reservation for a request."""
        return Hold(self, tenant)

    def take(self, tenant: str, size: int, held: int) -> None:
        """Reserve all of `size` bytes or none; see `Hold.take`."""
        mine = self._of.get(tenant, 0)
        if mine + size > self.per_tenant or self._used + size > self.total:
            if not self._reclaim(tenant, size):
                raise self._refusal(tenant, size, held, mine)
            mine = self._of.get(tenant, 0)
        self._of[tenant] = mine + size
        self._used += size

    def give(self, tenant: str, size: int) -> None:
        """Release reserved bytes."""
        left = self._of.get(tenant, 0) - size
        if left > 0:
            self._of[tenant] = left
        else:
            self._of.pop(tenant, None)
        self._used -= size

    def lend(self, hold: Hold, end: Callable[[], None]) -> None:
        """Make a reservation reclaimable; see `Hold.lend`."""
        self._lent[hold] = end

    def keep(self, hold: Hold) -> None:
        """Make the reservation no longer reclaimable."""
        self._lent.pop(hold, None)

    def _reclaim(self, tenant: str, size: int) -> bool:
        """Reclaim lent reservations until there is room, the same tenant's first; none if all are not enough."""
        own = [hold for hold in self._lent if hold.tenant == tenant]
        others = [hold for hold in self._lent if hold.tenant != tenant]
        mine = sum(hold.size for hold in own)
        theirs = sum(hold.size for hold in others)
        room = self.per_tenant - size
        if self._of.get(tenant, 0) - mine > room or self._used - mine - theirs + size > self.total:
            return False
        for hold in own + others:
            if self._of.get(tenant, 0) <= room and self._used + size <= self.total:
                break
            end = self._lent.pop(hold)
            hold.close()
            end()
        return True

    def _refusal(self, tenant: str, size: int, held: int, mine: int) -> TooLarge | QuotaExceeded | Unavailable:
        if held + size > self.per_tenant:
            return TooLarge(
                "take a request", expected=f"at most {self.per_tenant:,} {self._what}", got=f"{held + size:,}"
            )
        if mine + size > self.per_tenant:
            return QuotaExceeded(
                f"take a request of tenant {tenant!r}",
                expected=f"at most {self.per_tenant:,} {self._what} for a tenant",
                got=f"{mine:,} and {size:,} more",
                fix="Send it again when others were answered.",
                retry_after=_RETRY_SECONDS,
            )
        # The text must not reveal how much other tenants hold.
        return Unavailable(
            "take a request",
            problem=f"the server holds as many {self._what} as it may",
            fix="Send it again shortly.",
        )


class Hold:
    """Reservation of one request; released at the end of a `with` block, or by `close`.

    Args:
        budget: budget to reserve from.
        tenant: tenant of the request.

    Attributes:
        size: reserved bytes.
    """

    __slots__ = ("_budget", "size", "tenant")

    def __init__(self, budget: ByteBudget, tenant: str) -> None:
        self._budget = budget
        self.tenant = tenant
        self.size = 0

    def take(self, size: int) -> None:
        """Reserve more bytes, before memory is allocated.

        Raises:
            TooLarge: the request alone exceeds the limit of a tenant.
            QuotaExceeded: the tenant's limit is reached.
            Unavailable: the server's limit is reached.
        """
        if size:
            self._budget.take(self.tenant, size, self.size)
            self.size += size

    def give(self, size: int) -> None:
        """Release some bytes."""
        self._budget.give(self.tenant, size)
        self.size -= size

    def resize(self, size: int) -> None:
        """Reserve or release the difference to `size`; raises as `take` does."""
        if size > self.size:
            self.take(size - self.size)
        elif size < self.size:
            self.give(self.size - size)

    def lend(self, end: Callable[[], None]) -> None:
        """Let other requests reclaim this reservation until `keep`; the longest lent is reclaimed first.

        Args:
            end: called after the reservation was reclaimed, to end its request.
        """
        self._budget.lend(self, end)

    def keep(self) -> None:
        """Make the reservation no longer reclaimable."""
        self._budget.keep(self)

    def close(self) -> None:
        """Release all bytes."""
        if self.size:
            self._budget.give(self.tenant, self.size)
            self.size = 0

    def __enter__(self) -> Self:
        """Return the reservation."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release all bytes."""
        self.close()


def budget_of_bodies(max_body_bytes: int, total: int | None = None, per_tenant: int | None = None) -> ByteBudget:
    """Create the memory budget (default: sixteen of the largest bodies, at least 1 GiB)."""
    return ByteBudget(max(16 * max_body_bytes, _GIB) if total is None else total, per_tenant)


class Concurrency:
    """Counts in-flight requests (or streams) per key; belongs to the event loop's thread.

    Args:
        most: maximum number in flight per key.
        what: noun for error messages.
    """

    def __init__(self, most: int = 256, what: str = "requests") -> None:
        self._most = most
        self._what = what
        self._of: dict[str, int] = {}  # only keys with requests in flight

    def used_by(self, key: str) -> int:
        """Return the number in flight for a key."""
        return self._of.get(key, 0)

    def enter(self, key: str) -> None:
        """Count one in flight.

        Raises:
            QuotaExceeded: the key has reached its limit.
        """
        count = self._of.get(key, 0)
        if count >= self._most:
            raise QuotaExceeded(
                "take a request",
                expected=f"at most {self._most:,} {self._what} of a key at once",
                got="one more",
                fix="Send it again when others have ended.",
                retry_after=_RETRY_SECONDS,
            )
        self._of[key] = count + 1

    def leave(self, key: str) -> None:
        """Count one as finished."""
        left = self._of[key] - 1
        if left:
            self._of[key] = left
        else:
            del self._of[key]


@dataclass(frozen=True)
class Intake:
    """Budgets and threads of a server.

    Attributes:
        memory: memory budget for bodies, tensors and responses.
        staging: disk budget for unfinished uploads.
        offload: threads for decompressing, decoding and encoding.
        requests: limit of concurrent requests per key.
        streams: limit of open gRPC streams per key.
        refused: delay of tenants that send large refused messages.
    """

    memory: ByteBudget = field(default_factory=lambda: ByteBudget(_GIB))
    staging: ByteBudget = field(default_factory=lambda: ByteBudget(4 * _GIB, what="bytes of unfinished uploads"))
    offload: Offload = field(default_factory=Offload)
    requests: Concurrency = field(default_factory=Concurrency)
    streams: Concurrency = field(default_factory=lambda: Concurrency(64, "streams"))
    refused: RefusedBytes = field(default_factory=RefusedBytes)
