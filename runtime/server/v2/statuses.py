"""HTTP and gRPC status of each error."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from tpeft_deploy import errors
from tpeft_deploy.runtime.server.registry.files.disk import full, no_room

__all__ = ["MethodNotAllowed", "Status", "status_of"]

_log = logging.getLogger("tpeft_deploy.server")


@dataclass(frozen=True)
class Status:
    """Status and text of an error.

    Attributes:
        http: HTTP status code.
        grpc: name of the gRPC status.
        text: one line for the client, without paths, keys or other tenants' names.
        retry_after: seconds to wait before the same request may work, or None.
    """

    http: int
    grpc: str
    text: str
    retry_after: int | None = None


class MethodNotAllowed(errors.ServerError):
    """Raised for a method that a path does not support; `allowed` are the supported ones."""

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__("answer a request", expected=f"the method {self.allowed}", got=method[:20])


# The first matching class applies.
_TABLE: list[tuple[type[errors.TpeftError], int, str]] = [
    (errors.ProtocolError, 400, "INVALID_ARGUMENT"),
    (errors.TooLarge, 413, "RESOURCE_EXHAUSTED"),
    (errors.Unauthenticated, 401, "UNAUTHENTICATED"),
    (errors.Forbidden, 403, "PERMISSION_DENIED"),
    (MethodNotAllowed, 405, "UNIMPLEMENTED"),
    (errors.NotFound, 404, "NOT_FOUND"),
    (errors.UnknownTask, 404, "NOT_FOUND"),
    (errors.Conflict, 409, "FAILED_PRECONDITION"),
    (errors.PreconditionFailed, 412, "FAILED_PRECONDITION"),
    (errors.QuotaExceeded, 429, "RESOURCE_EXHAUSTED"),
    (errors.Unsupported, 501, "UNIMPLEMENTED"),
    (errors.ProviderUnavailable, 501, "UNIMPLEMENTED"),
    (errors.InsufficientStorage, 507, "RESOURCE_EXHAUSTED"),
    (errors.Unavailable, 503, "UNAVAILABLE"),
    (errors.QueueFull, 503, "UNAVAILABLE"),
    (errors.CapacityError, 503, "UNAVAILABLE"),
    (errors.DeadlineExceeded, 504, "DEADLINE_EXCEEDED"),
    (errors.InputError, 400, "INVALID_ARGUMENT"),
    (errors.CompositionError, 400, "INVALID_ARGUMENT"),
    (errors.AdapterError, 400, "INVALID_ARGUMENT"),
]
# The texts of these errors reveal queued, pinned and resident tasks of other tenants.
_NEUTRAL: dict[type[errors.TpeftError], str] = {
    errors.QueueFull: "queue a request: the server's queue is full. Retry later.",
    errors.CapacityError: (
        "load a task onto the device: no memory is free for it. Retry later, or request fewer tasks at once."
    ),
}
_LONGEST = 1500  # some texts repeat names sent by the client, which may be as long as a body
_OVERLOAD_SECONDS = 1  # queues hold at most a second of work, so a retry finds room or another result


def status_of(error: BaseException) -> Status:
    """Return the status and text of an error.

    Unexpected errors get a generic text, as their message might name files; the log has it.
    """
    if isinstance(error, OSError) and full(error):
        error = no_room("store the upload", error)
    for kind, http, grpc in _TABLE:
        if isinstance(error, kind):
            return Status(http, grpc, _clipped(_text(error)), _retry_after(error, http))
    return Status(500, "INTERNAL", "internal error; see the server's log")


def _text(error: errors.TpeftError) -> str:
    for kind, text in _NEUTRAL.items():
        if isinstance(error, kind):
            _log.info("%s", errors.brief(error, 500))
            return text
    return str(error)


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _retry_after(error: errors.TpeftError, http: int) -> int | None:
    if isinstance(error, errors.QuotaExceeded):
        return None if error.retry_after is None else max(1, math.ceil(error.retry_after))
    return _OVERLOAD_SECONDS if http == 503 else None
