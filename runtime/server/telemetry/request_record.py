"""Record of a request, filled in while it is served; the source of metrics, access log and traces."""

from __future__ import annotations

import itertools
import secrets
import time

from tpeft_deploy.runtime.server.tenancy.access import Principal

__all__ = ["TRACEPARENT", "RequestRecord", "request_id"]

TRACEPARENT = 128
"""Maximum length of a trace context; version 00 has 55 characters."""

_PROCESS = secrets.token_hex(6).encode()  # makes ids unique across servers and restarts
_COUNT = itertools.count(1)
_ID = 128


class RequestRecord:
    """Record of one request and its response.

    Args:
        protocol: "http" or "grpc".
        method: HTTP method, or name of the rpc.

    Attributes:
        route: path template, or full name of the rpc; "unknown" if there is none, so that invented paths never
            become a label.
        status: HTTP status, for gRPC the equivalent one; 499 when the client disconnected.
        caller: principal; None without authentication.
        task: requested model, as the client wrote it; empty if there is none.
        seconds: time from arrival to the last byte given to the transport; 0 until then.
        bytes_in: size of the request body or message.
        bytes_out: size of the response body or message.
    """

    __slots__ = (
        "_began",
        "bytes_in",
        "bytes_out",
        "caller",
        "method",
        "protocol",
        "route",
        "seconds",
        "status",
        "task",
    )

    def __init__(self, protocol: str, method: str) -> None:
        self._began = time.perf_counter()
        self.protocol = protocol
        self.method = method
        self.route = "unknown"
        self.status = 0
        self.caller: Principal | None = None
        self.task = ""
        self.seconds = 0.0
        self.bytes_in = 0
        self.bytes_out = 0

    @property
    def tenant(self) -> str:
        """Tenant of the caller; empty without authentication."""
        return "" if self.caller is None else self.caller.tenant

    @property
    def role(self) -> str:
        """Role of the caller; empty without authentication."""
        return "" if self.caller is None else self.caller.role.value

    @property
    def key(self) -> str:
        """Public id of the key; empty without authentication."""
        return "" if self.caller is None else self.caller.key

    @property
    def request_id(self) -> str:
        """Request id; empty if there is none."""
        return ""

    @property
    def traceparent(self) -> str:
        """W3C trace context as received; empty if there is none."""
        return ""

    def end(self) -> None:
        """Record the duration."""
        self.seconds = time.perf_counter() - self._began


def request_id(given: bytes | None) -> bytes:
    """Return the client's request id, or a new one.

    The client's id is used only if it is safe in logs and in a response header.
    """
    if given and len(given) <= _ID and all(33 <= byte < 127 for byte in given):
        return given
    return b"%b-%x" % (_PROCESS, next(_COUNT))
