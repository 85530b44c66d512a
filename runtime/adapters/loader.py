"""Loads versions onto the device in background threads."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tpeft_deploy.errors import DeadlineExceeded, QueueFull
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.version import Version, adapters
from tpeft_deploy.runtime.devices.spread import AnyResidency

__all__ = ["AdapterLoader"]


class AdapterLoader:
    """Loads adapters in background threads, round-robin over tenants, so that no event loop waits for disks or rows.

    Args:
        residency: residency of the versions.
        most: requests of one tenant that may wait for adapters.
    """

    def __init__(self, residency: AnyResidency, most: int = 1024) -> None:
        self._residency = residency
        self._most = most
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tpeft-load")
        self._lock = threading.Lock()
        # The tenants in the order of their turns; the oldest request of a tenant first.
        self._waiting: OrderedDict[str, OrderedDict[Future[Held], Sequence[Version]]] = OrderedDict()

    async def acquire(self, versions: Sequence[Version], timeout: float | None, tenant: str = "") -> Held:
        """Acquire versions as `Residency.acquire` does.

        Raises:
            AdapterError, BundleError, CapacityError: as there.
            QueueFull: too many requests of the tenant wait for adapters already.
            DeadlineExceeded: they were not there after `timeout` seconds.
        """
        taking = self._line_up(versions, tenant)
        patience = asyncio.timeout(timeout)
        try:
            async with patience:
                return await asyncio.wrap_future(taking)
        except BaseException:
            self._step_back(taking, tenant)
            taking.add_done_callback(_release)
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
            self._residency.acquire([version]).release()

    def close(self) -> None:
        """End the threads, once what they do is done."""
        self._threads.shutdown()

    def _line_up(self, versions: Sequence[Version], tenant: str) -> Future[Held]:
        taking: Future[Held] = Future()
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

    def _step_back(self, taking: Future[Held], tenant: str) -> None:
        """Read nothing for a request that is given up before its turn came."""
        with self._lock:
            own = self._waiting.get(tenant)
            if own is not None and own.pop(taking, None) is not None and not own:
                del self._waiting[tenant]
        taking.cancel()

    def _take_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return  # a request stepped back
            tenant, own = self._waiting.popitem(last=False)
            taking, versions = own.popitem(last=False)
            if own:
                self._waiting[tenant] = own
        if not taking.set_running_or_notify_cancel():
            return
        try:
            taking.set_result(self._residency.acquire(versions, new=True))
        except BaseException as error:
            taking.set_exception(error)


def _release(taking: Future[Held]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        taking.result().release()


def _named(versions: Sequence[Version]) -> str:
    names = [version.name for version in adapters(versions)]
    return f"task {names[0]!r}" if len(names) == 1 else f"{len(names)} tasks, {names[0]!r} among them"
