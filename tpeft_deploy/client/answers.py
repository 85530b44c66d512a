"""Responses of a server: body buffers, JSON documents, and error statuses as exceptions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from tpeft_deploy import errors

__all__ = [
    "HEADER_LENGTH",
    "Answer",
    "Document",
    "BodyBuffer",
    "document",
    "documents",
    "error_in_stream",
    "nothing",
    "refusal",
    "retry_after",
]

Document = dict[str, Any]

HEADER_LENGTH = "Inference-Header-Content-Length"

_KINDS: dict[int, type[errors.TpeftError]] = {
    400: errors.InputError,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.PreconditionFailed,
    413: errors.TooLarge,
    501: errors.Unsupported,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
    507: errors.InsufficientStorage,
}
# Types of errors in OpenAI's form, which is all that a stream has after its status was sent.
_STATUSES = {
    "invalid_request_error": 400,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "service_unavailable_error": 503,
    "timeout_error": 504,
}
_ALIGNMENT = 16  # of a bytearray's memory; no numpy dtype needs more


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response.

    Attributes:
        status: HTTP status.
        headers: headers by case-insensitive name.
        body: decompressed body.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview


class BodyBuffer:
    """Collects the body of a response so that its tensors can be used in place, writable and aligned.

    Args:
        headers: headers of the response, with the length of the JSON before the tensors.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        length = headers.get(HEADER_LENGTH, "")
        self._padding = -int(length) % _ALIGNMENT if length.isascii() and length.isdigit() else 0
        self._buffer = bytearray(self._padding)

    def add(self, chunk: bytes) -> None:
        """Append a chunk."""
        self._buffer += chunk

    def view(self) -> memoryview:
        """Return the whole body."""
        return memoryview(self._buffer)[self._padding :]


def document(answer: Answer) -> Document:
    """Return a body that is a JSON object.

    Raises:
        ServerError: it is not one.
    """
    found = _json(answer)
    if not isinstance(found, dict):
        raise errors.ServerError("read the answer", expected="a JSON object", got=type(found).__name__)
    return found


def documents(answer: Answer) -> list[Document]:
    """Return a body that is a JSON array of objects.

    Raises:
        ServerError: it is not one.
    """
    found = _json(answer)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise errors.ServerError("read the answer", expected="a JSON array of objects", got=type(found).__name__)
    return found


def nothing(answer: Answer) -> None:
    """Ignore the body of a successful response."""


def _json(answer: Answer) -> object:
    try:
        return json.loads(bytes(answer.body))
    except (ValueError, RecursionError) as error:
        raise errors.ServerError("read the answer", expected="JSON", got=_shown(answer.body)) from error


def refusal(answer: Answer, doing: str) -> errors.TpeftError:
    """Return the error for an error status, with the server's text.

    Both a full queue and a server that starts or drains are 503; the text tells them apart.
    """
    text = _error_text(answer.body)
    if text is None:
        own = f"status {answer.status} with {_shown(answer.body)}"
        return _kind(answer.status)(doing, expected="a server of tpeft_deploy to answer", got=own)
    if answer.status == 429:
        return errors.QuotaExceeded(text, retry_after=retry_after(answer.headers))
    return _kind(answer.status, text)(text)


def error_in_stream(event: Document) -> errors.TpeftError | None:
    """Return the error that an event reports in OpenAI's form; None if it reports none."""
    found = event.get("error")
    if found is None:
        return None
    text = _text_of(found) or repr(found)[:120]
    status = _STATUSES.get(str(found.get("type")), 500) if isinstance(found, dict) else 500
    return errors.QuotaExceeded(text) if status == 429 else _kind(status, text)(text)


def _kind(status: int, text: str = "") -> type[errors.TpeftError]:
    if status == 503 and text.startswith("queue "):
        return errors.QueueFull
    return _KINDS.get(status, errors.ServerError)


def _error_text(body: memoryview) -> str | None:
    try:
        found = json.loads(bytes(body))
    except (ValueError, RecursionError):
        return None
    return _text_of(found.get("error")) if isinstance(found, dict) else None


def _text_of(error: object) -> str | None:
    """Return the text of an error of V2, or in OpenAI's form."""
    text = error.get("message") if isinstance(error, dict) else error
    return text if isinstance(text, str) and text else None


def _shown(body: memoryview) -> str:
    return repr(bytes(body[:120]).decode(errors="replace"))


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds of a Retry-After header; None when it is missing or malformed."""
    stated = headers.get("Retry-After", "").strip()
    if not stated:
        return None
    try:
        seconds = float(stated)
    except ValueError:
        try:
            until = parsedate_to_datetime(stated)
        except ValueError:
            return None
        # Dates without a zone are UTC in HTTP.
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        seconds = (until - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
