"""Stopping the work for clients that went away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

__all__ = ["Left", "Watch"]

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Left(Exception):
    """The client went away."""


class _Waiting:
    """A request that is waited for; `watching` once somebody looks whether its client is still there."""

    __slots__ = ("is_old", "left", "receive", "task", "watching")

    def __init__(self, task: asyncio.Task[Any], receive: Receive) -> None:
        self.task = task
        self.receive = receive
        self.is_old = False
        self.left = False
        self.watching: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.task.cancel()


class Watch:
    """Looks after all requests of one event loop that are waited for.

    A task that only waits for a client to leave costs as much as a fast answer, which is there before stopping it
    would save anything: so only requests that have waited for a while have one.

    Args:
        patience: seconds, once to twice which a request waits without being watched.
    """

    def __init__(self, patience: float = 0.02) -> None:
        self._patience = patience
        self._waiting: set[_Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def unless_left(self, work: Awaitable[T], receive: Receive) -> T:
        """The result of some work, which is cancelled when the client goes away.

        Raises:
            Left: it did.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("nobody to cancel: this is called from a task")
        own = _Waiting(task, receive)
        self._waiting.add(own)
        if self._timer is None:
            self._timer = loop.call_later(self._patience, self._look)
        try:
            return await work
        except asyncio.CancelledError:
            if own.left and task.uncancel() == 0:
                raise Left from None
            raise
        finally:
            self._waiting.discard(own)
            if own.watching is not None:
                own.watching.cancel()

    def _look(self) -> None:
        self._timer = None
        for own in self._waiting:
            if not own.is_old:
                own.is_old = True
            elif own.watching is None:
                own.watching = asyncio.get_running_loop().create_task(own.watch())
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._look)
