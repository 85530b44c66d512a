"""Errors in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re

from tpeft_deploy import errors
from tpeft_deploy.runtime.server.operations.generation import ContextExceeded
from tpeft_deploy.runtime.server.v2.statuses import Status

__all__ = ["PREFIX", "document", "schema"]

PREFIX = "/v1/"
"""Beginning of the paths that answer in this form."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES = {
    401: "invalid_api_key",
    403: "insufficient_permissions",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
    504: "timeout",
}
# Wordings of the checks of a request, each with the field that it is about.
_PARAMETERS = (
    re.compile(r"read field '([\w.\[\]]+)'"),
    re.compile(r"set how .* expected (temperature|top_k|top_p|min_p|\w+_penalty|seed|n|logprobs) to be "),
    re.compile(r"read a body: Object missing required field `(\w+)`"),
    re.compile(r"read a body: [^$]* - at `\$\.(\w+)"),
)


def document(error: BaseException, status: Status, model: str) -> dict[str, object]:
    """Return the body of an error's response.

    Args:
        error: the exception.
        status: status and text of it.
        model: model that the request named; empty if there is none.
    """
    found = next(filter(None, (pattern.match(status.text) for pattern in _PARAMETERS)), None)
    param, code = found[1] if found else None, _CODES.get(status.http)
    if status.http == 404 and model and isinstance(error, errors.NotFound | errors.UnknownTask):
        param, code = "model", "model_not_found"
    elif isinstance(error, ContextExceeded):
        code = "context_length_exceeded"
    kind = _TYPES.get(status.http, "server_error")
    return {"error": {"message": status.text, "type": kind, "param": param, "code": code}}


def schema() -> dict[str, object]:
    """Return the JSON schema of `document`."""
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}
    return {"type": "object", "required": ["error"], "properties": {"error": error}, "additionalProperties": False}
