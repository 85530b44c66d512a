"""Receiving messages: room is taken before one is received, and no call waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tpeft_deploy.errors import DeadlineExceeded, ServerError, Unavailable
from tpeft_deploy.runtime.server.tenancy.byte_budget import Hold
from tpeft_deploy.runtime.server.v2.limits import RpcLimits

__all__ = ["FIRST", "read_message"]

FIRST = 1 << 16
"""Bytes that are reserved for a message of which nothing is known."""
_IDLE = "none came, and others needed the room that was kept for it"
_AT_ONCE = 0.05  # seconds: what comes within these is little, for all calls together, as the network is no faster


async def read_message(
    context: Any, hold: Hold, limits: RpcLimits, seconds: float | None, *, lent: bool = False
) -> bytes | None:
    """The next message of a call; None: there is none.

    Nobody says how large a message is before it is whole.  One that is not there at once counts as the largest until
    it is; one that is counts as what it has.

    Args:
        context: of the call.
        hold: takes the room.
        limits: on messages.
        seconds: that it may take; None: any.
        lent: whether others may have the room while none comes, which ends the call.

    Raises:
        QuotaExceeded, Unavailable: there is no room, or others have it.
        DeadlineExceeded: it took too long.
    """
    if hold.size < FIRST:
        hold.resize(FIRST)
    doing = "read a message"
    loop = asyncio.get_running_loop()
    refused: list[ServerError] = []

    def refuse(error: ServerError) -> None:
        refused.append(error)
        scope.reschedule(loop.time())

    def reserve() -> None:
        try:
            hold.resize(max(hold.size, limits.message_bytes))
        except ServerError as error:
            refuse(error)
        else:
            if lent:
                hold.lend(lambda: refuse(Unavailable(doing, problem=_IDLE, fix="Open another.")))

    timer = loop.call_later(_AT_ONCE, reserve)
    try:
        async with asyncio.timeout(seconds) as scope:
            data = await context.read()
    except TimeoutError:
        if refused:
            raise refused.pop() from None
        raise DeadlineExceeded(doing, expected=f"all of it within {seconds:g} s", got="less") from None
    finally:
        timer.cancel()
        hold.keep()
    if data is grpc.aio.EOF:
        return None
    found: bytes = data
    hold.resize(len(found))
    return found
