"""Receiving of messages, with memory reserved before each one and a timeout."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tpeft_deploy.errors import DeadlineExceeded, ServerError, Unavailable
from tpeft_deploy.runtime.server.tenancy.intake import Hold
from tpeft_deploy.runtime.server.v2.limits import RpcLimits

__all__ = ["FIRST", "read_message"]

FIRST = 1 << 16
"""Bytes reserved for a message of unknown size."""
_IDLE = "none came, and others needed the room that was kept for it"
_AT_ONCE = 0.05  # seconds; network speed bounds the bytes that all calls together receive in this time


async def read_message(
    context: Any, hold: Hold, limits: RpcLimits, seconds: float | None, *, lent: bool = False
) -> bytes | None:
    """Receive the next message of a call; return None at the end.

    The size of a message is unknown until it is complete.  A message that is not available at once is charged as the
    largest possible until it arrives; one that is available is charged by its size.

    Args:
        context: gRPC context of the call.
        hold: reservation for the message.
        limits: limits of messages.
        seconds: timeout; None for no timeout.
        lent: whether other requests may reclaim the memory while no message arrives, which ends the call.

    Raises:
        QuotaExceeded, Unavailable: the memory budget is used up, or the memory was reclaimed.
        DeadlineExceeded: the message did not arrive in time.
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
