"""Bytes that requests hold at once: reserved before they are read, and given back however a request ends."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from tpeft_deploy.errors import QuotaExceeded, TooLarge, Unavailable

__all__ = ["ByteBudget", "Hold", "budget_of_bodies"]

_RETRY_SECONDS = 1.0
_LEAST = 1 << 30


class ByteBudget:
    """Counts what is held by all requests, and by those of each tenant.  Belongs to one thread: the event loop's.

    Args:
        total: bytes for the whole server.
        per_tenant: bytes for one tenant; None: half of `total`.
        what: noun for messages.
    """

    def __init__(self, total: int, per_tenant: int | None = None, what: str = "bytes in flight") -> None:
        self.total = total
        self.per_tenant = min(total, total // 2 if per_tenant is None else per_tenant)
        self._what = what
        self._used = 0
        self._of: dict[str, int] = {}  # only of tenants that hold something
        self._lent: dict[Hold, Callable[[], None]] = {}  # how to end those that others may have, longest first

    @property
    def used(self) -> int:
        """Bytes that are held now."""
        return self._used

    def used_by(self, tenant: str) -> int:
        """Bytes that a tenant's requests hold now."""
        return self._of.get(tenant, 0)

    def hold(self, tenant: str) -> Hold:
        """Empty reservation for one request of a tenant."""
        return Hold(self, tenant)

    def take(self, tenant: str, size: int, held: int) -> None:
        """Reserve bytes, or nothing at all; see `Hold.take`."""
        mine = self._of.get(tenant, 0)
        if mine + size > self.per_tenant or self._used + size > self.total:
            if not self._reclaim(tenant, size):
                raise self._refusal(tenant, size, held, mine)
            mine = self._of.get(tenant, 0)
        self._of[tenant] = mine + size
        self._used += size

    def give(self, tenant: str, size: int) -> None:
        """Give back bytes that were taken."""
        left = self._of.get(tenant, 0) - size
        if left > 0:
            self._of[tenant] = left
        else:
            self._of.pop(tenant, None)
        self._used -= size

    def lend(self, hold: Hold, end: Callable[[], None]) -> None:
        """Let others have what is held; see `Hold.lend`."""
        self._lent[hold] = end

    def keep(self, hold: Hold) -> None:
        """Lend no longer."""
        self._lent.pop(hold, None)

    def _reclaim(self, tenant: str, size: int) -> bool:
        """Take back what is lent until there is room, the tenant's own first; nothing if that would not do."""
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
        # Nothing of how much others hold.
        return Unavailable(
            "take a request",
            problem=f"the server holds as many {self._what} as it may",
            fix="Send it again shortly.",
        )


class Hold:
    """What one request holds of a budget; given back at the end of a `with` block, or by `close`.

    Args:
        budget: where it is taken from.
        tenant: owner of the request.

    Attributes:
        size: bytes that it holds.
    """

    __slots__ = ("_budget", "_tenant", "size")

    def __init__(self, budget: ByteBudget, tenant: str) -> None:
        self._budget = budget
        self._tenant = tenant
        self.size = 0

    @property
    def tenant(self) -> str:
        """Owner of the request."""
        return self._tenant

    def take(self, size: int) -> None:
        """Reserve more bytes, before memory is taken for them.

        Raises:
            TooLarge: the request alone would need more than a tenant may hold.
            QuotaExceeded: the tenant holds too much.
            Unavailable: the server does.
        """
        if size:
            self._budget.take(self._tenant, size, self.size)
            self.size += size

    def give(self, size: int) -> None:
        """Give back some of it."""
        self._budget.give(self._tenant, size)
        self.size -= size

    def resize(self, size: int) -> None:
        """Take or give the difference to what it is to hold; raises as `take` does."""
        if size > self.size:
            self.take(size - self.size)
        elif size < self.size:
            self.give(self.size - size)

    def lend(self, end: Callable[[], None]) -> None:
        """Let other requests have what is held, until `keep`; the longest lent goes first.

        Args:
            end: called after it was given back, to end what it was held for.
        """
        self._budget.lend(self, end)

    def keep(self) -> None:
        """Lend no longer."""
        self._budget.keep(self)

    def close(self) -> None:
        """Give back everything."""
        if self.size:
            self.give(self.size)

    def __enter__(self) -> Self:
        """Return the hold."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back everything."""
        self.close()


def budget_of_bodies(max_body_bytes: int, total: int | None = None, per_tenant: int | None = None) -> ByteBudget:
    """Budget of bytes in flight; by default room for sixteen of the largest bodies, and 1 GiB at least."""
    return ByteBudget(max(16 * max_body_bytes, _LEAST) if total is None else total, per_tenant)
