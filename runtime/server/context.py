"""Request context of both protocols: filled in while a request is served; metrics and access log read it."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Self

from tpeft_deploy.errors import Unauthenticated
from tpeft_deploy.runtime.server.tenancy.access import Principal
from tpeft_deploy.runtime.server.tenancy.intake import Concurrency, Hold, Intake
from tpeft_deploy.runtime.server.v2.offload import PIECE

__all__ = ["GONE", "RequestContext", "TRACEPARENT"]

GONE = 499
"""Status of a request after its client disconnected; used in logs and metrics only."""
TRACEPARENT = 128
"""Maximum length of a trace context; version 00 has 55 characters."""

_PROCESS = secrets.token_hex(6).encode()  # makes ids unique across servers and restarts
_COUNT = itertools.count(1)
_ID = 128


class RequestContext:
    """One request: principal, result, times, and the memory, disk space and concurrency that it holds until `close`.

    Args:
        protocol: "http" or "grpc".
        method: HTTP method, or name of the rpc.
        intake: budgets and threads of the server.
        given_id: request id sent by the client; used if it is safe in logs and in a response header.
        traceparent: W3C trace context as received; empty if there is none.

    Attributes:
        route: path template, or full name of the rpc; "unknown" if there is none, so that invented paths never
            become a label.
        status: HTTP status, for gRPC the equivalent one; 499 when the client disconnected.
        caller: authenticated principal; None before and without authentication.
        task: requested model, as the client wrote it; empty if there is none.
        seconds: time from arrival to the last byte given to the transport; 0 until then.
        deadline: seconds from arrival until the client's deadline; None without one.
        bytes_in: size of the request body or message.
        bytes_out: size of the response body or message.
    """

    __slots__ = (
        *("_began", "_counted", "_given_id", "_id", "_memory", "_staging", "bytes_in", "bytes_out", "caller"),
        *("deadline", "intake", "method", "protocol", "route", "seconds", "status", "task", "traceparent"),
    )

    def __init__(self, protocol: str, method: str, intake: Intake, given_id: bytes, traceparent: str) -> None:
        self._began = time.perf_counter()
        self._counted: Concurrency | None = None
        self._given_id = given_id
        self._id = b""
        self._memory: Hold | None = None
        self._staging: Hold | None = None
        self.protocol = protocol
        self.method = method
        self.intake = intake
        self.traceparent = traceparent[:TRACEPARENT]
        self.route = "unknown"
        self.status = 0
        self.caller: Principal | None = None
        self.task = ""
        self.seconds = 0.0
        self.deadline: float | None = None
        self.bytes_in = 0
        self.bytes_out = 0

    @property
    def principal(self) -> Principal:
        """The authenticated principal.

        Raises:
            Unauthenticated: the request has no key.
        """
        if self.caller is None:
            raise Unauthenticated("request", expected="a key", got="none")
        return self.caller

    @property
    def tenant(self) -> str:
        """Tenant of the caller; empty without authentication."""
        return "" if self.caller is None else self.caller.tenant

    @property
    def key(self) -> str:
        """Public id of the key; empty without authentication."""
        return "" if self.caller is None else self.caller.key

    @property
    def id_bytes(self) -> bytes:
        """Request id of the client if it is safe to log; else a generated one."""
        if not self._id:
            given = self._given_id
            safe = given and len(given) <= _ID and all(33 <= byte < 127 for byte in given)
            self._id = given if safe else b"%b-%x" % (_PROCESS, next(_COUNT))
        return self._id

    @property
    def request_id(self) -> str:
        """Request id as text."""
        return self.id_bytes.decode("latin-1")

    @property
    def memory(self) -> Hold:
        """Memory reserved for the request and its response; create it after authentication."""
        if self._memory is None:
            self._memory = Hold(self.intake.memory, self.tenant)
        return self._memory

    @property
    def staging(self) -> Hold:
        """Disk space reserved for an upload; create it after authentication."""
        if self._staging is None:
            self._staging = Hold(self.intake.staging, self.tenant)
        return self._staging

    def enter(self, among: Concurrency) -> Self:
        """Count the request of an authenticated principal until `close`, or the end of a `with` block.

        Raises:
            QuotaExceeded: the key has reached its limit.
        """
        if self.caller is not None:
            among.enter(self.caller.key)
            self._counted = among
        return self

    def close(self) -> None:
        """Release memory, disk space and concurrency."""
        if self._memory is not None:
            self._memory.close()
        if self._staging is not None:
            self._staging.close()
        if self._counted is not None:
            self._counted.leave(self.key)
            self._counted = None

    def __enter__(self) -> Self:
        """Return the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release what the request holds."""
        self.close()

    def charge_refusal(self) -> None:
        """Delay the tenant's next message after a large refused one."""
        if self.caller is not None and self.bytes_in > PIECE:
            self.intake.refused.charge(self.caller.tenant, self.bytes_in)

    def end(self) -> None:
        """Record the duration."""
        self.seconds = time.perf_counter() - self._began
