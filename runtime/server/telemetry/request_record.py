"""What is known of a request, filled in while it is answered; metrics, access log and traces are made from it."""

from __future__ import annotations

import itertools
import secrets
import time

from tpeft_deploy.runtime.server.tenancy.access import Principal

__all__ = ["TRACEPARENT", "Exchange", "request_id"]

TRACEPARENT = 128
"""Characters of a caller's trace context; version 00 has 55."""

_PROCESS = secrets.token_hex(6).encode()  # ids of one server are not those of another, nor of its next start
_COUNT = itertools.count(1)
_ID = 128


class Exchange:
    """One request and its answer.

    Args:
        protocol: "http" or "grpc".
        method: the HTTP method, or the name of the rpc.

    Attributes:
        route: the route's template, or the rpc's full name; "unknown" where there is none, so that what clients make
            up never becomes a label.
        status: HTTP status, of gRPC the one that REST would have answered; 499 when the client went away.
        caller: whose key it had; None when there was none.
        task: the model that was asked for, as the client wrote it; empty when the request names none.
        seconds: from the request's arrival to its last byte handed to the transport; 0 until then.
        bytes_in: size of the request's body or message.
        bytes_out: size of the answer's.
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
        """Of the key; empty when there was none."""
        return "" if self.caller is None else self.caller.tenant

    @property
    def role(self) -> str:
        """Of the key; empty when there was none."""
        return "" if self.caller is None else self.caller.role.value

    @property
    def key(self) -> str:
        """The key's public id; empty when there was none."""
        return "" if self.caller is None else self.caller.key

    @property
    def request_id(self) -> str:
        """The client's own; where it has none the server's, if it gives any."""
        return ""

    @property
    def traceparent(self) -> str:
        """Of W3C trace context, as it came; empty when there was none."""
        return ""

    def end(self) -> None:
        """It was answered."""
        self.seconds = time.perf_counter() - self._began


def request_id(given: bytes | None) -> bytes:
    """The id that a client gave, or one of the server.

    A client's own goes into logs and back into a header: only if it can do no harm there.
    """
    if given and len(given) <= _ID and all(33 <= byte < 127 for byte in given):
        return given
    return b"%b-%x" % (_PROCESS, next(_COUNT))
