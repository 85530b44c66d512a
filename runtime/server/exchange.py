"""What is known about a request once it was answered: what metrics, access log and traces are made from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Exchange"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer.

    Attributes:
        protocol: "http" or "grpc".
        method: the HTTP method, or the name of the rpc.
        route: the route's template, or the rpc's full name; "unknown" where there is none, so that what clients make
            up never becomes a label.
        status: HTTP status, of gRPC the one that REST would have answered; 499 when the client went away.
        tenant: of the key; empty when there was none.
        role: of the key; empty when there was none.
        key: the key's public id; empty when there was none.
        task: the model that was asked for, as the client wrote it; empty when the request names none.
        seconds: from the request's arrival to its last byte handed to the transport.
        bytes_in: size of the request's body or message.
        bytes_out: size of the answer's.
        request_id: the client's own; empty when there was none.
        traceparent: of W3C trace context, as it came; empty when there was none.
    """

    protocol: str
    method: str
    route: str
    status: int
    tenant: str = ""
    role: str = ""
    key: str = ""
    task: str = ""
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    request_id: str = ""
    traceparent: str = ""
