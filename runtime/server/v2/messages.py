"""Protocol-independent inference messages, and the values that REST, gRPC and the operations exchange."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.tucker import Array

__all__ = [
    "BASE",
    "Document",
    "Encoded",
    "InferRequest",
    "InferResponse",
    "LoadParameter",
    "Parameter",
    "UploadPart",
    "ServedVersion",
]

Document = dict[str, Any]
"""A JSON object in the field names of the V2 protocol."""
UploadPart = tuple[str, AsyncIterator[bytes]]
"""One file of an upload: "weights" or "config", and its bytes as they arrive."""
Parameter = str | int | float | bool


class ServedVersion(msgspec.Struct, frozen=True):
    """Adapter version that a row runs on.

    Attributes:
        key: key of the version in the runtime.
        tenant: owner of the task.
        task: name of the task.
        version: version number; "1" for the base.
        digest: SHA-256 of the adapter; "base" for the base model.
    """

    key: str
    tenant: str
    task: str
    version: str
    digest: str


BASE = ServedVersion(BASE_TASK, SHARED, BASE_TASK, "1", BASE_TASK)


class Encoded(msgspec.Struct, frozen=True):
    """A base64 file, decoded while it is stored.

    Attributes:
        text: base64 text; a view of the request body.
    """

    text: memoryview


LoadParameter = Parameter | bytes | Encoded
"""A parameter of a load call; a file is base64 text (REST) or raw bytes (gRPC)."""


class InferRequest(msgspec.Struct, frozen=True):
    """A decoded V2 inference request, validated against the protocol but not yet against the model.

    Attributes:
        model: name of a task, of `base`, or of the bundle; with `/COMPONENT` for one of several components.
        version: version number or alias of the task; empty for the current version.
        id: request id given by the client; returned in the response.
        inputs: input name -> array, contiguous or a view of the request body; BYTES are arrays of `bytes` objects,
            BF16 are uint16.
        outputs: requested output names, in order; empty for all.
        adapter: task for the whole batch, from a parameter or header; None if not given.
        component: component to run, from a parameter; None if not given.
        timeout: seconds until the request expires; None for no timeout.
        priority: scheduling priority (default 0); within a tenant, smaller values are served first.
        traceparent: W3C trace context as received; empty if there is none.
    """

    model: str
    inputs: Mapping[str, Array]
    version: str = ""
    id: str = ""
    outputs: Sequence[str] = ()
    adapter: str | None = None
    component: str | None = None
    timeout: float | None = None
    priority: int = 0
    traceparent: str = ""


class InferResponse(msgspec.Struct, frozen=True):
    """The response to an inference request.

    Attributes:
        model: model name from the request.
        version: version that ran; empty if the rows have different tasks.
        id: id from the request.
        outputs: output name -> array, in the requested order or the model's.
        datatypes: V2 datatype of each output, in the same order.
        parameters: response parameters, among them `adapter_digest`: the SHA-256 of the adapter ("base" for none), or
            one per row, separated by commas.
    """

    model: str
    version: str
    id: str
    outputs: Mapping[str, Array]
    datatypes: Sequence[str]
    parameters: Mapping[str, Parameter] = {}
