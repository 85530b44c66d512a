from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpeft_deploy.runtime.server.telemetry.request_record import TRACEPARENT, Exchange, request_id
from tpeft_deploy.runtime.server.tenancy.access import Principal

__all__ = ["Account"]


class Account(Exchange):
    """An `Exchange` over gRPC.

    Args:
        method: name of the rpc.
        route: its full name.
        metadata: of the call.
        caller: whose key it had, if it is known already.
        size: of the message.
    """

    __slots__ = ("_id", "_metadata", "_own")

    def __init__(
        self, method: str, route: str, metadata: Mapping[str, str], caller: Principal | None = None, size: int = 0
    ) -> None:
        super().__init__("grpc", method)
        self.route = route
        self.status = 200
        self.caller = caller
        self.bytes_in = size
        self._metadata = metadata
        self._id = ""
        self._own = b""

    def asked(self, request: Any) -> None:
        """Take from a message which model it is for, and its id."""
        self.task = getattr(request, "model_name", "") or getattr(request, "name", "")
        self._id = getattr(request, "id", "")
        self._own = b""

    @property
    def request_id(self) -> str:
        """The client's own, where it can do no harm in a log; else the server's."""
        if not self._own:
            self._own = request_id((self._id or self._metadata.get("x-request-id", "")).encode("utf-8", "replace"))
        return self._own.decode("latin-1")

    @property
    def traceparent(self) -> str:
        """The caller's."""
        return self._metadata.get("traceparent", "")[:TRACEPARENT]
