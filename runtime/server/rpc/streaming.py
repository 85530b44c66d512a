from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

__all__ = ["in_order"]

T = TypeVar("T")


async def in_order(
    context: Any, read: Callable[[], Awaitable[T | None]], answer: Callable[[T], Awaitable[bytes]], in_flight: int
) -> None:
    """Answer the messages of a stream at the same time, in the order in which they came.

    Whatever ends the stream early cancels the answers that are not there yet.

    Args:
        context: of the call, for writing.
        read: the next message; None at the end.
        answer: the answer to one message; what it raises ends the stream.
        in_flight: messages that are read but not yet answered; the client waits when there are more.
    """
    room = asyncio.Semaphore(in_flight)
    waiting: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:

        async def one(data: T) -> bytes:
            return await answer(data)

        async def read_all() -> None:
            await room.acquire()
            while (data := await read()) is not None:
                waiting.put_nowait(group.create_task(one(data)))
                del data
                await room.acquire()
            waiting.put_nowait(None)

        group.create_task(read_all())
        while (task := await waiting.get()) is not None:
            await context.write(await task)
            room.release()
