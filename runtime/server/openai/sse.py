"""Server-sent events: a response that is sent piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Self

import orjson

__all__ = ["DONE", "EventStream", "event"]

DONE = b"data: [DONE]\n\n"
"""Last event of a stream in OpenAI's API."""


def event(document: object) -> bytes:
    """Encode one event."""
    return b"data: %b\n\n" % orjson.dumps(document)


@dataclass(frozen=True)
class EventStream:
    """A response of which the parts are sent as they come.

    Attributes:
        first: encoded events that there are already; may be empty.
        rest: those that follow; closed when the response ends, or the client leaves.
    """

    first: bytes
    rest: AsyncGenerator[bytes]

    @classmethod
    async def begun(cls, parts: AsyncGenerator[bytes]) -> Self:
        """Wait for the first part, so that errors until then have a status, and closing ends what was begun."""
        return cls(await anext(parts), parts)
