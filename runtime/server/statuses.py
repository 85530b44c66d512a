"""Which status an error has over HTTP and over gRPC: one table for both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tpeft_deploy import errors

__all__ = ["MethodNotAllowed", "Status", "status_of"]


@dataclass(frozen=True)
class Status:
    """How a refusal is told.

    Attributes:
        http: status code.
        grpc: name of the gRPC status.
        text: one line for the client, without paths, keys or other tenants' names.
        retry_after: seconds to wait before the same request may work, or None.
    """

    http: int
    grpc: str
    text: str
    retry_after: int | None = None


class MethodNotAllowed(errors.ServerError):
    """Raised for a path that exists, with a method that it does not have; `allowed` are those it has."""

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__("answer a request", expected=f"the method {self.allowed}", got=method[:20])


# The first class that fits decides.
_TABLE: list[tuple[type[errors.TpeftError], int, str]] = [
    (errors.ProtocolError, 400, "INVALID_ARGUMENT"),
    (errors.TooLarge, 413, "RESOURCE_EXHAUSTED"),
    (errors.Unauthenticated, 401, "UNAUTHENTICATED"),
    (errors.Forbidden, 403, "PERMISSION_DENIED"),
    (MethodNotAllowed, 405, "UNIMPLEMENTED"),
    (errors.NotFound, 404, "NOT_FOUND"),
    (errors.UnknownTask, 404, "NOT_FOUND"),
    (errors.Conflict, 409, "FAILED_PRECONDITION"),
    (errors.QuotaExceeded, 429, "RESOURCE_EXHAUSTED"),
    (errors.Unsupported, 501, "UNIMPLEMENTED"),
    (errors.Unavailable, 503, "UNAVAILABLE"),
    (errors.QueueFull, 503, "UNAVAILABLE"),
    (errors.CapacityError, 503, "UNAVAILABLE"),
    (errors.DeadlineExceeded, 504, "DEADLINE_EXCEEDED"),
    (errors.InputError, 400, "INVALID_ARGUMENT"),
    (errors.CompositionError, 400, "INVALID_ARGUMENT"),
    (errors.AdapterError, 400, "INVALID_ARGUMENT"),
]
_LONGEST = 1500  # some texts repeat what the client called something, which may be as long as a body
_OVERLOAD_SECONDS = 1  # queues hold a second of work at most; who comes again by then finds room or another answer


def status_of(error: BaseException) -> Status:
    """How a client is told about an error.

    What the server did not expect has no text of its own, as that might name files: the log has it.
    """
    for kind, http, grpc in _TABLE:
        if isinstance(error, kind):
            return Status(http, grpc, _clipped(str(error)), _retry_after(error, http))
    return Status(500, "INTERNAL", "internal error: the server's log says what happened")


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _retry_after(error: errors.TpeftError, http: int) -> int | None:
    if isinstance(error, errors.QuotaExceeded):
        return None if error.retry_after is None else max(1, math.ceil(error.retry_after))
    return _OVERLOAD_SECONDS if http == 503 else None
