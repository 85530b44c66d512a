"""Long computations on bytes, off the event loop."""

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
"""Bytes of text that are converted in one step: about a millisecond, for which no other thread runs."""
_PAUSE = 1e-4


class Offload:
    """Few threads that decompress, decode and encode what is large; one piece of work of a tenant at a time.

    Args:
        threads: how many; two tenants are served at once by two.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tpeft-bytes", initializer=_give_way)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def run(self, tenant: str, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """The result of some work, which ends before this does: what it reads stays reserved until then."""
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
    # On Linux a thread has a priority of its own: the event loop and the runs go first.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _outcome(work: Callable[[], R]) -> tuple[R | None, list[Exception]]:
    # A future and the error that it has refer to each other: what the work read would stay until a collection.
    try:
        return work(), []
    except Exception as error:
        return None, [error]


def breathe() -> None:
    """Let other threads run between two pieces, which the interpreter alone does only every 5 ms."""
    time.sleep(_PAUSE)
