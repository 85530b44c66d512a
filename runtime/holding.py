"""Bringing versions to the device without holding up whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tpeft_deploy.errors import DeadlineExceeded
from tpeft_deploy.runtime.tiers import Tiers
from tpeft_deploy.runtime.versions import Version

__all__ = ["Holder"]


class Holder:
    """Threads that wait for disks and rows in the place of event loops.

    Args:
        tiers: where the versions are.
    """

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tpeft-load")

    async def take(self, versions: Sequence[Version], timeout: float | None) -> None:
        """`Tiers.take`; who awaits it gives them back.

        Raises:
            AdapterError, BundleError, CapacityError: as there.
            DeadlineExceeded: they were not there after `timeout` seconds.
        """
        if self._tiers.take_resident(versions):
            return
        taking = self._threads.submit(self._tiers.take, versions)
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(taking)), timeout)
        except BaseException as error:
            taking.add_done_callback(lambda done: self._let_go(versions, done))
            if isinstance(error, TimeoutError):
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

    def _let_go(self, versions: Sequence[Version], taking: Future[None]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self._tiers.give_back(versions)


def _named(versions: Sequence[Version]) -> str:
    if len(versions) == 1:
        return f"task {versions[0].name!r}"
    return f"{len(versions)} tasks, {versions[0].name!r} among them"
