from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tpeft_deploy.runtime.server.access import Principal
from tpeft_deploy.runtime.server.exchange import Exchange

__all__ = ["Account"]


class Account:
    """What becomes known of a request while it is answered.

    Args:
        method: name of the rpc.
        route: its full name.
        metadata: of the call.
        caller: whose key it had, if it is known already.
        size: of the message.

    Attributes:
        caller: whose key it had.
        status: HTTP status that the request ends with.
        bytes_in: size of the message.
        bytes_out: size of the answer.
    """

    def __init__(
        self, method: str, route: str, metadata: Mapping[str, str], caller: Principal | None = None, size: int = 0
    ) -> None:
        self._began = time.perf_counter()
        self._method = method
        self._route = route
        self._metadata = metadata
        self._task = ""
        self._request_id = ""
        self.caller = caller
        self.status = 200
        self.bytes_in = size
        self.bytes_out = 0

    def asked(self, request: Any) -> None:
        """Take from a message which model it is for, and its id."""
        self._task = getattr(request, "model_name", "") or getattr(request, "name", "")
        self._request_id = getattr(request, "id", "")

    def exchange(self) -> Exchange:
        """What to tell, now that the answer is there."""
        caller = self.caller
        return Exchange(
            protocol="grpc",
            method=self._method,
            route=self._route,
            status=self.status,
            tenant="" if caller is None else caller.tenant,
            role="" if caller is None else caller.role.value,
            key="" if caller is None else caller.key,
            task=self._task,
            seconds=time.perf_counter() - self._began,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            request_id=self._request_id or self._metadata.get("x-request-id", ""),
            traceparent=self._metadata.get("traceparent", ""),
        )
