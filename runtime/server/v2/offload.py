"""Threads for long computations on bytes, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar, cast

__all__ = ["Offload", "PIECE", "breathe"]

P = ParamSpec("P")
R = TypeVar("R")

PIECE = 1 << 16
"""Bytes of text converted in one step; no other thread runs for about a millisecond."""
_PAUSE = 1e-4


class Offload:
    """Small thread pool for decompressing, decoding and encoding large bodies; one call per tenant at a time.

    Args:
        threads: number of threads, and so of tenants served concurrently.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tpeft-bytes", initializer=_give_way)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def run(self, tenant: str, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Return the result of `work`; wait for it even if cancelled, so that its memory stays reserved until then."""
        turn = self._turns.get(tenant)
        if turn is None:
            turn = self._turns[tenant] = asyncio.Lock()
        async with turn:
            call = partial(_outcome, partial(work, *args, **options))
            future = asyncio.get_running_loop().run_in_executor(self._threads, call)
            try:
                found, errors = await asyncio.shield(future)
            except asyncio.CancelledError:
                await asyncio.wait([future])
                raise
        if errors:
            raise errors.pop()
        return cast("R", found)


def _give_way() -> None:
    # Linux has priorities per thread: the event loop and the runs take precedence.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _outcome(work: Callable[[], R]) -> tuple[R | None, list[Exception]]:
    # A future and its exception reference each other, which would keep the work's memory until a garbage collection.
    try:
        return work(), []
    except Exception as error:
        return None, [error]


def breathe() -> None:
    """Yield to other threads between two pieces; the interpreter alone switches only every 5 ms."""
    time.sleep(_PAUSE)
