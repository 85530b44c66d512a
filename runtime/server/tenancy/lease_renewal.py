"""Renewal of a server's lease in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.server.registry.leases import Leases
from tpeft_deploy.runtime.server.tenancy.meter import Meter
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.shared_meter import LeaseFigures, SharedMeter
from tpeft_deploy.runtime.server.tenancy.shares import PERIOD, LeaseGrant, LeaseReport

__all__ = ["LeaseRenewal", "open_meter"]

_Run = Callable[[Callable[[LeaseReport], LeaseGrant], LeaseReport], Awaitable[LeaseGrant]]
_log = logging.getLogger("tpeft_deploy.server")


class LeaseRenewal:
    """Keeps the lease of a server; on the event loop, but for the transactions.

    Args:
        meter: meter of the shares.
        server: name of the server.
        renew: renews the lease by a transaction.
        clock: monotonic clock in seconds, that of the meter's callers.
    """

    def __init__(
        self,
        meter: SharedMeter,
        server: str,
        renew: Callable[[LeaseReport], LeaseGrant],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter, self._server, self._renew, self._clock = meter, server, renew, clock

    def begin(self) -> None:
        """Take the lease, before there is an event loop.

        Raises:
            ServerError, Unavailable: the database does not give it.
        """
        began = self._clock()
        self._meter.take(self._renew(self._meter.report(self._server, began)), began, self._clock())

    def has_begun(self) -> bool:
        """Return whether this server has a share of all rates; a second or two after its start beside others."""
        return self._meter.has_begun(self._clock())

    def figures(self) -> LeaseFigures:
        """Return the lease, for the metrics; may be called by any thread."""
        return self._meter.figures(self._clock())

    async def once(self, run: _Run) -> None:
        """Renew the lease once.

        Args:
            run: calls a function in another thread.

        Raises:
            ServerError, Unavailable: the database does not renew it; the lease goes on until its end.
        """
        began = self._clock()
        grant = await run(self._renew, self._meter.report(self._server, began))
        self._meter.take(grant, began, self._clock())

    async def keep(self, run: _Run) -> None:
        """Renew the lease every `PERIOD`, until cancelled.

        Args:
            run: calls a function in another thread.
        """
        failed = False
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.once(run)
            except Exception as error:  # the rates fall back to the reserve until a renewal succeeds
                if not failed:
                    unknown = not isinstance(error, ServerError)
                    _log.warning("cannot renew the lease of rates: %s", error, exc_info=unknown)
                failed = True
            else:
                failed = False


def open_meter(quota: Callable[[str], Quota], leases: Leases | None) -> tuple[Meter, LeaseRenewal | None]:
    """Return the meter of rates, and what keeps its lease where servers share them.

    Args:
        quota: returns the current quota of a tenant.
        leases: leases of the registry; None if this server is alone.

    Raises:
        ServerError, Unavailable: the database gives no lease.
    """
    if leases is None:
        return Meter(quota), None
    meter = SharedMeter(quota)
    lease = LeaseRenewal(meter, leases.server, leases.renew)
    lease.begin()
    return meter, lease
