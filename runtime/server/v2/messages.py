"""Requests and answers as the protocols share them: what REST and gRPC translate to and from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from tpeft_deploy.tucker import Array

__all__ = ["Encoded", "InferRequest", "InferResponse", "LoadParameter", "Parameter"]

Parameter = str | int | float | bool


class Encoded(msgspec.Struct, frozen=True):
    """A file in base64, decoded as it is stored.

    Attributes:
        text: as it stands in JSON; a view of the request's body.
    """

    text: memoryview


LoadParameter = Parameter | bytes | Encoded
"""A parameter of a load call; a file is base64 as text, or bytes as they are."""


class InferRequest(msgspec.Struct, frozen=True):
    """A V2 inference request, decoded and checked against the protocol but not yet against the model.

    Attributes:
        model: name of a task, of `base`, or of the bundle.
        version: of the task, or one of its aliases; empty: the one it stands for now.
        id: the client's own, given back.
        inputs: input name -> array, contiguous or a view of the request's bytes; BYTES are arrays of `bytes` objects,
            BF16 are uint16.
        outputs: names that are asked for, in order; empty: all.
        adapter: a task for the whole batch named outside the inputs, by parameter or header; None: not so.
        timeout: seconds within which an answer is of use; None: always.
        priority: 0 unless given; requests of a tenant with a smaller one are served first.
        traceparent: of W3C trace context, as it came; empty: none.
    """

    model: str
    inputs: Mapping[str, Array]
    version: str = ""
    id: str = ""
    outputs: Sequence[str] = ()
    adapter: str | None = None
    timeout: float | None = None
    priority: int = 0
    traceparent: str = ""


class InferResponse(msgspec.Struct, frozen=True):
    """The answer.

    Attributes:
        model: the name that was asked for.
        version: the version that answered; empty where rows had tasks of their own.
        id: the request's.
        outputs: output name -> array, in the order asked for, or of the model.
        datatypes: V2 datatype of each output, in the same order.
        parameters: among them `adapter_digest`, the SHA-256 of the adapter that answered, or one a row joined by
            commas, "base" for rows without.
    """

    model: str
    version: str
    id: str
    outputs: Mapping[str, Array]
    datatypes: Sequence[str]
    parameters: Mapping[str, Parameter] = {}
