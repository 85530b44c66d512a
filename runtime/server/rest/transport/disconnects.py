"""Cancellation of requests after their client disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

__all__ = ["ClientLeft", "Watch"]

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientLeft(Exception):
    """The client disconnected."""


class _Waiting:
    """A pending request; `watching` is set once its connection is watched."""

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
    """Cancellation of in-flight requests of one event loop on disconnect of their client.

    Watching a connection takes a task, which costs as much as a fast response; so only requests that have been pending
    for a while are watched.

    Args:
        patience: seconds; a request is watched after it has been pending for one to two times as long.
    """

    def __init__(self, patience: float = 0.02) -> None:
        self._patience = patience
        self._waiting: set[_Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def cancel_on_disconnect(self, work: Awaitable[T], receive: Receive) -> T:
        """Await `work`, and cancel it when the client disconnects.

        Raises:
            ClientLeft: the client disconnected.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("expected to be called from a task")
        own = _Waiting(task, receive)
        self._waiting.add(own)
        if self._timer is None:
            self._timer = loop.call_later(self._patience, self._look)
        try:
            return await work
        except asyncio.CancelledError:
            if own.left and task.uncancel() == 0:
                raise ClientLeft from None
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
