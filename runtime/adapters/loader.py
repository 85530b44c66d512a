"""Loads versions onto the device in background threads."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tpeft_deploy.errors import DeadlineExceeded, QueueFull
from tpeft_deploy.runtime.adapters.residency import Tiers
from tpeft_deploy.runtime.adapters.version import Version

__all__ = ["Holder"]


class Holder:
    """Threads that wait for disks and rows in the place of event loops, for one tenant after the other.

    Args:
        tiers: residency of the versions.
        most: requests of one tenant that may wait for adapters.
    """

    def __init__(self, tiers: Tiers, most: int = 1024) -> None:
        self._tiers = tiers
        self._most = most
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tpeft-load")
        self._lock = threading.Lock()
        # Whose turn it is; the oldest of a tenant first.
        self._waiting: OrderedDict[str, OrderedDict[Future[None], Sequence[Version]]] = OrderedDict()

    async def take(self, versions: Sequence[Version], timeout: float | None, tenant: str = "") -> None:
        """Acquire versions as `Tiers.take` does; the caller releases them.

        Raises:
            AdapterError, BundleError, CapacityError: as there.
            QueueFull: too many requests of the tenant wait for adapters already.
            DeadlineExceeded: they were not there after `timeout` seconds.
        """
        taking = self._line_up(versions, tenant)
        patience = asyncio.timeout(timeout)
        try:
            async with patience:
                await asyncio.wrap_future(taking)
        except BaseException:
            self._step_back(taking, tenant)
            taking.add_done_callback(lambda done: self._let_go(versions, done))
            if patience.expired():
                raise DeadlineExceeded(
                    f"run {_named(versions)}",
                    expected=f"what it needs on the device within {timeout:g} s",
                    got="adapters that are still being read",
                    fix="Prefetch them, or give it more time.",
                ) from None
            raise

    def prefetch(self, versions: Iterable[Version]) -> Future[None]:
        """Bring versions to the device in the background, one after the other."""
        return self._threads.submit(self.bring, list(versions))

    def bring(self, versions: Iterable[Version]) -> None:
        """Bring versions to the device."""
        for version in versions:
            with self._tiers.using([version]):
                pass

    def close(self) -> None:
        """End the threads, once what they do is done."""
        self._threads.shutdown()

    def _line_up(self, versions: Sequence[Version], tenant: str) -> Future[None]:
        taking: Future[None] = Future()
        with self._lock:
            own = self._waiting.setdefault(tenant, OrderedDict())
            if len(own) >= self._most:
                raise QueueFull(
                    f"bring {_named(versions)} to the device",
                    expected=f"at most {self._most} requests of one tenant that wait for adapters",
                    got=f"{len(own)} before it",
                    fix="Send it again later, or prefetch what will be asked for.",
                )
            own[taking] = versions
        self._threads.submit(self._take_next)
        return taking

    def _step_back(self, taking: Future[None], tenant: str) -> None:
        """Read nothing for a request that is given up before its turn came."""
        with self._lock:
            own = self._waiting.get(tenant)
            if own is not None and own.pop(taking, None) is not None and not own:
                del self._waiting[tenant]
        taking.cancel()

    def _take_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return  # somebody stepped back
            tenant, own = self._waiting.popitem(last=False)
            taking, versions = own.popitem(last=False)
            if own:
                self._waiting[tenant] = own
        if not taking.set_running_or_notify_cancel():
            return
        try:
            self._tiers.take(versions, new=True)
        except BaseException as error:  # whoever awaits it gets it
            taking.set_exception(error)
        else:
            taking.set_result(None)

    def _let_go(self, versions: Sequence[Version], taking: Future[None]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self._tiers.give_back(versions)


def _named(versions: Sequence[Version]) -> str:
    if len(versions) == 1:
        return f"task {versions[0].name!r}"
    return f"{len(versions)} tasks, {versions[0].name!r} among them"
