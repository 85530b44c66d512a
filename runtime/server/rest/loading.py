"""Parameters of the repository's load call, with files as base64 in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpeft_deploy.errors import ProtocolError
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.rest.json_data import SMALL, cut_strings
from tpeft_deploy.runtime.server.v2.messages import Encoded, LoadParameter
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["load_parameters", "parameters_of"]


async def load_parameters(context: HttpContext) -> dict[str, LoadParameter]:
    """Read the parameters; large files stay in the body and are decoded while they are stored.

    Raises:
        ProtocolError: the body is not valid JSON of this form.
        TooLarge: the body exceeds the limit of JSON uploads.
        QuotaExceeded, Unavailable: the memory budget is used up.
    """
    limits = context.limits
    limit = min(limits.json_upload_bytes, 4 * limits.upload_bytes // 3 + limits.document_bytes)
    fix = "Upload it by POST /v2/registry/tasks/TASK/versions, which takes files as they are."
    context.staging.take(min(context.declared, limit))
    text = await context.body(limit, fix)
    context.staging.resize(len(text))
    if len(text) <= SMALL:
        return dict(parameters_of(context.parsed(text)))
    head, strings = await context.intake.offload.run(context.memory.tenant, cut_strings, "read a body", text)
    found: dict[str, LoadParameter] = {}
    for name, value in parameters_of(context.parsed(head)).items():
        place = strings.get(value) if isinstance(value, str) else None
        if place is None:
            found[name] = value
        elif text.find(b"\\", *place) >= 0:  # some clients escape the slashes of base64
            found[name] = context.parsed(b'{"":"%b"}' % bytes(text[place[0] : place[1]]))[""]
        else:
            found[name] = Encoded(memoryview(text)[place[0] : place[1]])
    return found


def parameters_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `parameters` of a document without other fields.

    Raises:
        ProtocolError: the document has other fields.
    """
    if not set(document) <= {"parameters"}:
        raise ProtocolError("read a body", expected="a field 'parameters'", got=", ".join(map(quoted, document)))
    found = document.get("parameters") or {}
    if not isinstance(found, dict) or not all(isinstance(one, str | int | float) for one in found.values()):
        raise ProtocolError("read 'parameters'", expected="an object of strings, numbers and booleans", got="others")
    return found
