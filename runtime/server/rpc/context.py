"""Context of a gRPC call, or of one message of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.tenancy.intake import Hold, Intake
from tpeft_deploy.runtime.server.v2.limits import RpcLimits

__all__ = ["RpcContext"]


class RpcContext(RequestContext):
    """Context of a gRPC call, or of one message of a stream.

    Args:
        core: the server's operations.
        limits: limits of messages.
        intake: budgets and threads of the server.
        method: name of the rpc.
        route: full name of the rpc.
        metadata: text metadata, keys in lower case.

    Attributes:
        streamed: whether the message is one of a stream.
        raws: raw tensors that were split off the message.
        heavy: whether decoding the message would block the event loop for long.
    """

    __slots__ = ("core", "heavy", "limits", "metadata", "raws", "streamed")

    def __init__(
        self, core: Service, limits: RpcLimits, intake: Intake, method: str, route: str, metadata: Mapping[str, str]
    ) -> None:
        super().__init__("grpc", method, intake, _bytes(metadata.get("x-request-id")), metadata.get("traceparent", ""))
        self.core = core
        self.limits = limits
        self.metadata = metadata
        self.route = route
        self.status = 200
        self.streamed = False
        self.raws: Sequence[memoryview] | None = None
        self.heavy = False

    def message(self, memory: Hold, size: int) -> Self:
        """Create the context of a received message of this stream.

        Args:
            memory: memory reserved for it.
            size: size of the message in bytes.
        """
        own = type(self)(self.core, self.limits, self.intake, self.method, self.route, self.metadata)
        own._memory = memory
        own.caller = self.caller
        own.bytes_in = size
        own.streamed = True
        return own

    def describe(self, request: Any) -> None:
        """Record model and id of a message."""
        self.task = getattr(request, "model_name", "") or getattr(request, "name", "")
        self._given_id = _bytes(getattr(request, "id", "")) or self._given_id
        self._id = b""


def _bytes(text: str | None) -> bytes:
    return (text or "").encode("utf-8", "replace")
