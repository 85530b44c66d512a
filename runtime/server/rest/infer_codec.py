"""Codec of inference request and response bodies: JSON followed by the binary tensor extension.

The elements of a tensor are in its `data`, or raw after the JSON in the order of the tensors; the header
`Inference-Header-Content-Length` is the length of the JSON after decompression.  That header alone selects the format,
as clients send JSON without a content type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import orjson

from tpeft_deploy.errors import ProtocolError, Unsupported
from tpeft_deploy.runtime.server.rest.infer_json import FLOATS, Head, head_of
from tpeft_deploy.runtime.server.rest.json_data import SMALL, cut
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.messages import InferRequest, InferResponse
from tpeft_deploy.runtime.server.v2.offload import PIECE, breathe
from tpeft_deploy.runtime.server.v2.tensors import DTYPES, encode_raw, from_raw, quoted, raw_view
from tpeft_deploy.tucker import Array

__all__ = [
    "ADAPTER_HEADERS",
    "Framed",
    "HEADER",
    "InferenceHeaderCache",
    "decode",
    "encode",
    "encode_parts",
    "header_length",
    "is_heavy",
    "json_bytes",
]

HEADER = b"inference-header-content-length"
ADAPTER_HEADERS = frozenset({b"x-adapter", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id"})
_CHECKED = {"BOOL", "BYTES"}  # datatypes with invalid byte patterns
_KEPT = 1024
_KEPT_BYTES = 4096  # maximum size of a cached head


class InferenceHeaderCache:
    """Parser of inference heads with a cache of repeated ones.

    Clients that send raw tensors repeat the same JSON with every request of the same shapes.  The cache key is the
    whole JSON; JSON with tensor data or a request id is not cached.

    Args:
        limits: limits of tensors.
    """

    def __init__(self, limits: RestLimits) -> None:
        self._limits = limits
        self._known: dict[bytes, Head] = {}

    def __len__(self) -> int:
        """Return the number of cached heads."""
        return len(self._known)

    def read(self, model: str, text: bytes) -> Head:
        """Parse and validate the JSON of a request for a model; raises as `head_of` does."""
        if len(text) > _KEPT_BYTES:
            return head_of(model, text, self._limits)
        found = self._known.get(text)
        if found is None:
            found = head_of(model, text, self._limits)
            if not found.id and all(own.elements is None for own in found.inputs):
                if len(self._known) >= _KEPT:
                    del self._known[next(iter(self._known))]
                self._known[text] = found
        return found

    def read_in_pieces(self, model: str, text: bytes | bytearray) -> Head:
        """Parse JSON that is too large for one step; other threads run between its pieces."""
        parts = cut(f"read a request for model {quoted(model)}", text)
        return head_of(model, parts.head, self._limits, parts.blocks)


class Framed(msgspec.Struct, frozen=True):
    """A decoded request, and the head that determines the format of its response."""

    request: InferRequest
    head: Head


def decode(
    model: str,
    version: str,
    headers: Mapping[bytes, bytes],
    body: bytes | bytearray | memoryview,
    heads: InferenceHeaderCache,
    adapter: str | None = None,
    traceparent: str = "",
) -> Framed:
    """Decode the body of an inference request.

    Args:
        model: model name in the path.
        version: model version in the path.
        headers: request headers, names in lower case.
        body: decompressed body.
        heads: cache of parsed inference headers.
        adapter: adapter named by a header.
        traceparent: W3C trace context of the caller.

    Raises:
        ProtocolError: the body violates the protocol.
        TooLarge: a tensor exceeds the limits.
        Unsupported: the request uses shared memory or the classification extension.
    """
    end = header_length(headers, len(body))
    whole = body if end == len(body) and isinstance(body, bytes | bytearray) else bytes(body[:end])
    head = heads.read(model, bytes(whole)) if end <= SMALL else heads.read_in_pieces(model, whole)
    if head.model_name is not None and head.model_name != model:
        raise ProtocolError(
            f"read a request for model {quoted(model)}",
            expected="the same model_name, or none",
            got=quoted(head.model_name),
        )
    request = InferRequest(
        model=model,
        inputs=_inputs(head, body, end),
        version=version,
        id=head.id,
        outputs=head.outputs,
        adapter=head.adapter if adapter is None else _agreed(head.adapter, adapter),
        component=head.component,
        timeout=head.timeout,
        priority=head.priority,
        traceparent=traceparent,
    )
    return Framed(request, head)


def is_heavy(headers: Mapping[bytes, bytes], body: bytes | bytearray | memoryview) -> bool:
    """Return whether decoding a body would block the event loop; raw numeric tensors are views of any size.

    Raises:
        ProtocolError, Unsupported: the header with the length of the JSON is invalid.
    """
    if len(body) <= SMALL:
        return False
    end = header_length(headers, len(body))
    return end > SMALL or b"BYTES" in bytes(body[:end])


def encode(response: InferResponse, framed: Framed) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Encode a response to headers and body.

    Raises:
        ProtocolError: an output was requested as JSON but has no JSON representation.
    """
    headers, parts = encode_parts(response, framed)
    return headers, parts[0] if len(parts) == 1 else b"".join(parts)


def encode_parts(response: InferResponse, framed: Framed) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """Encode a response to headers and body parts: JSON, and raw outputs, which are not copied if large.

    Raises:
        ProtocolError: an output was requested as JSON but has no JSON representation.
    """
    outputs = []
    raws: list[bytes] = []
    for (name, array), datatype in zip(response.outputs.items(), response.datatypes, strict=True):
        document: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if _is_raw(name, framed.head):
            raws.append(encode_raw(array, datatype) if array.nbytes <= SMALL else raw_view(array, datatype))
            document["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            document["data"] = _as_json(name, array, datatype)
        outputs.append(document)
    document = {"model_name": response.model, "outputs": outputs, "parameters": dict(response.parameters)}
    if response.version:
        document["model_version"] = response.version
    if response.id:
        document["id"] = response.id
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raws:
        return [(b"content-type", b"application/json")], [text]
    headers = [(b"content-type", b"application/octet-stream"), (HEADER, b"%d" % len(text))]
    return headers, [text, *raws]


def json_bytes(response: InferResponse, head: Head) -> int:
    """Return the size in bytes of the outputs that a response encodes as JSON."""
    return sum(array.nbytes for name, array in response.outputs.items() if not _is_raw(name, head))


def _is_raw(name: str, head: Head) -> bool:
    asked = name if name in head.chosen else name.rpartition(".")[0]
    return head.chosen.get(asked, head.raw)


def header_length(headers: Mapping[bytes, bytes], size: int) -> int:
    """Return the length of the JSON at the start of a body of `size` bytes.

    Raises:
        ProtocolError, Unsupported: the header with the length is invalid.
    """
    given = headers.get(HEADER)
    if given is None:
        return size
    if not given.isdigit() or len(given) > 12 or int(given) > size:
        raise ProtocolError(
            "read the header Inference-Header-Content-Length",
            expected=f"a number from 1 to the body's {size} bytes",
            got=quoted(given.decode("latin-1")),
        )
    if int(given) == 0:
        raise Unsupported(
            "read a request",
            problem="its body is one raw tensor without JSON",
            fix="Send the JSON with name, shape and datatype before it.",
        )
    return int(given)


def _inputs(head: Head, body: bytes | bytearray | memoryview, at: int) -> dict[str, Array]:
    """Return the tensors of a body; raw tensors are views of it."""
    inputs: dict[str, Array] = {}
    for own in head.inputs:
        if own.elements is not None:
            inputs[own.name] = own.elements.reshape(own.shape)
            continue
        size = own.size
        if size > len(body) - at:
            raise ProtocolError(
                f"input {quoted(own.name)}, binary_data_size",
                expected=f"0 to the {len(body) - at} bytes that are left",
                got=size,
            )
        if own.datatype in _CHECKED or not size:
            raw = memoryview(body)[at : at + size]
            inputs[own.name] = from_raw(f"input {quoted(own.name)}", own.datatype, raw, own.count).reshape(own.shape)
        else:
            inputs[own.name] = np.ndarray(own.shape, DTYPES[own.datatype], body, at)
        at += size
    if at != len(body):
        raise ProtocolError(
            "read the inputs",
            expected="as many raw bytes as they name",
            got=f"{len(body) - at} more",
            fix="Send no more.",
        )
    return inputs


def _as_json(name: str, array: Array, datatype: str) -> Any:
    if datatype == "BYTES":
        try:
            return [one.decode() if isinstance(one, bytes) else str(one) for one in array.ravel().tolist()]
        except UnicodeDecodeError:
            raise _no_form(name, "bytes that are no text") from None
    if datatype == "BF16":
        raise _no_form(name, "BF16")
    flat = np.ascontiguousarray(array).ravel()
    if datatype in FLOATS:
        # JSON has no NaN or infinity, and clients would read null as a number.
        if not np.isfinite(flat).all():
            raise _no_form(name, "numbers that are not finite")
        flat = flat.astype(np.float32) if datatype == "FP16" else flat
    return flat if flat.nbytes <= SMALL else orjson.Fragment(_in_pieces(flat))


def _in_pieces(flat: Array) -> bytes:
    step = PIECE // flat.itemsize
    pieces = []
    for at in range(0, len(flat), step):
        pieces.append(orjson.dumps(flat[at : at + step], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        breathe()
    return b"[%b]" % b",".join(pieces)


def _no_form(name: str, what: str) -> ProtocolError:
    return ProtocolError(
        f"answer with output {quoted(name)} in JSON",
        expected="elements that JSON has a form for",
        got=what,
        fix="Ask for binary_data.",
    )


def _agreed(parameter: str | None, header: str) -> str:
    if parameter is not None and parameter != header:
        raise ProtocolError(
            "adapter",
            expected="one task for the whole batch",
            got=f"{quoted(parameter)} as parameter and {quoted(header)} as header",
        )
    return header
