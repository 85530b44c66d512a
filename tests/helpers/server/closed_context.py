"""gRPC contexts without gRPC, of calls whose client leaves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc

from tests.helpers.server.rpc_serving import key_of

CLOSED = grpc.aio.InternalError("Failed 'execute_batch'")


@dataclass
class ClosedContext:
    """A call whose client leaves when the first message is sent: what gRPC does then, in any order of events."""

    messages: list[bytes]
    aborted: bool = False

    def time_remaining(self) -> float | None:
        return None

    async def read(self) -> Any:
        while not self.messages:
            await asyncio.sleep(100)
        return self.messages.pop(0)

    async def write(self, data: bytes) -> None:
        raise CLOSED

    async def abort(self, *status: Any) -> None:
        self.aborted = True
        raise CLOSED


@dataclass(frozen=True)
class Details:
    """What gRPC tells a servicer of a call."""

    method: str
    invocation_metadata: Any = field(default_factory=lambda: key_of("acme-deploy"))
