"""Sending messages and statuses to gRPC clients that may be gone."""

from __future__ import annotations

from typing import Any

import grpc

from tpeft_deploy.runtime.server.v2.statuses import Status

__all__ = ["ClientGone", "abort", "clipped", "send"]

_TEXT_BYTES = 1000  # clients accept 8 KiB of trailers, and percent-encoding triples a byte


class ClientGone(Exception):
    """The client ended the call before a message was sent."""


async def send(context: Any, data: bytes) -> None:
    """Send a message.

    Args:
        context: gRPC context of the call.
        data: serialised message.

    Raises:
        ClientGone: the call has ended. gRPC fails a write that is under way when a call ends, and cancels the
            handler only afterwards.
    """
    try:
        await context.write(data)
    except grpc.aio.InternalError as error:
        raise ClientGone from error


async def abort(context: Any, status: Status) -> None:
    """End a call with a status; a call that has ended is left as it is.

    Args:
        context: gRPC context of the call.
        status: status of an error.

    Raises:
        grpc.aio.AbortError: always when the status was sent, as gRPC expects of a handler.
    """
    trailers = () if status.retry_after is None else (("retry-after", str(status.retry_after)),)
    try:
        await context.abort(grpc.StatusCode[status.grpc], clipped(status.text), trailers)
    except grpc.aio.InternalError:
        return


def clipped(text: str) -> str:
    """Return a text, cut to what fits into the trailers of a call."""
    data = text.encode()
    return text if len(data) <= _TEXT_BYTES else data[:_TEXT_BYTES].decode(errors="ignore") + "..."
