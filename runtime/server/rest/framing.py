"""Inference requests and answers as bodies: JSON, with the binary tensor extension after it.

Elements of a tensor are in its `data`, or raw behind the JSON in the order of the tensors; the header
`Inference-Header-Content-Length` says where the JSON ends, after decompression.  A body is told apart by that header
alone, as clients send JSON without a content type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import orjson

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.elements import DTYPES, Bounds, check_shape, encode_raw, from_raw, objects, quoted
from tpeft_deploy.runtime.server.messages import InferRequest, InferResponse, Parameter
from tpeft_deploy.tucker import Array

__all__ = ["ADAPTER_HEADERS", "Framed", "HEADER", "Limits", "decode", "encode"]

HEADER = b"inference-header-content-length"
ADAPTER_HEADERS = (b"x-adapter", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id")
_FLOATS = {"FP16", "FP32", "FP64"}


@dataclass(frozen=True)
class Limits(Bounds):
    """What one request over HTTP may ask for, checked before memory is taken for it.

    Attributes:
        body_bytes: of a request, after decompression.
        upload_bytes: of an upload.
        document_bytes: of the JSON of other requests.
        tensors: inputs and outputs that a request may name.
    """

    body_bytes: int = 64 << 20
    upload_bytes: int = 1 << 30
    document_bytes: int = 1 << 20
    tensors: int = 256


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Parameter] | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Parameter] | None = None


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Parameter] | None = None
    outputs: list[_Output] | None = None
    model_name: str | None = None  # kserve's client repeats the path here


_decoder = msgspec.json.Decoder(_Request)


@dataclass(frozen=True, slots=True)
class Framed:
    """A request, and how its answer is to be framed: names of outputs to send raw, or None for what `raw` says."""

    request: InferRequest
    raw: bool
    chosen: Mapping[str, bool]


def decode(
    model: str, version: str, headers: Mapping[bytes, bytes], body: bytes, limits: Limits, adapter: str | None = None
) -> Framed:
    """What a body asks for.

    Args:
        model: from the path.
        version: from the path.
        headers: of the request, in lower case.
        body: decompressed.
        limits: on tensors.
        adapter: named by a header.

    Raises:
        ProtocolError: the body is not what the protocol says.
        TooLarge: a tensor is beyond the limits.
        Unsupported: tensors in shared memory, or an answer as classification.
    """
    end = _header_length(headers, len(body))
    try:
        parsed = _decoder.decode(memoryview(body)[:end])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"read a request for model {quoted(model)}", problem=_clipped(str(error))) from None
    except RecursionError:
        raise ProtocolError(f"read a request for model {quoted(model)}", problem="it is nested too deeply") from None
    if parsed.model_name not in {None, model}:
        raise ProtocolError(
            f"read a request for model {quoted(model)}",
            expected="the same model_name, or none",
            got=quoted(parsed.model_name or ""),
        )
    outputs = parsed.outputs or []
    if len(parsed.inputs) + len(outputs) > limits.tensors:
        raise TooLarge(
            f"read a request for model {quoted(model)}",
            expected=f"at most {limits.tensors} inputs and outputs",
            got=len(parsed.inputs) + len(outputs),
        )
    parameters = parsed.parameters or {}
    inputs = _inputs(parsed.inputs, memoryview(body)[end:], limits)
    request = InferRequest(
        model=model,
        inputs=inputs,
        version=version,
        id=parsed.id or "",
        outputs=_names(outputs),
        adapter=_agreed(parameters.get("adapter"), adapter),
        timeout=_whole(parameters, "timeout") / 1e6 or None,
        priority=_whole(parameters, "priority"),
    )
    chosen = {
        output.name: bool(output.parameters["binary_data"])
        for output in outputs
        if output.parameters and "binary_data" in output.parameters
    }
    return Framed(request, bool(parameters.get("binary_data_output", False)), chosen)


def encode(response: InferResponse, framed: Framed) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an answer.

    Raises:
        ProtocolError: an output that JSON has no form for was asked for in JSON.
    """
    outputs = []
    raws: list[bytes] = []
    for (name, array), datatype in zip(response.outputs.items(), response.datatypes, strict=True):
        asked = name if name in framed.chosen else name.rpartition(".")[0]
        document: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if framed.chosen.get(asked, framed.raw):
            raws.append(encode_raw(array, datatype))
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
        return [(b"content-type", b"application/json")], text
    headers = [(b"content-type", b"application/octet-stream"), (HEADER, b"%d" % len(text))]
    return headers, b"".join([text, *raws])


def _header_length(headers: Mapping[bytes, bytes], size: int) -> int:
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


def _inputs(tensors: Sequence[_Tensor], rest: memoryview, limits: Limits) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    for tensor in tensors:
        doing = f"input {quoted(tensor.name)}"
        if not tensor.name or tensor.name in inputs:
            raise ProtocolError(doing, problem="it has no name, or that of another input")
        parameters = tensor.parameters or {}
        _refuse(doing, parameters, "shared_memory_region", "tensors in shared memory")
        count = check_shape(doing, tensor.shape, tensor.datatype, limits)
        data = bytes(tensor.data)
        size = parameters.get("binary_data_size")
        if size is None:
            if not data:
                raise ProtocolError(doing, expected="data, or a parameter binary_data_size", got="neither")
            flat = _from_json(doing, tensor, data, count)
        else:
            if data:
                raise ProtocolError(doing, expected="data or binary_data_size", got="both")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
                raise ProtocolError(
                    f"{doing}, binary_data_size", expected=f"0 to the {len(rest)} bytes that are left", got=repr(size)
                )
            flat = from_raw(doing, tensor.datatype, rest[:size], count)
            rest = rest[size:]
        inputs[tensor.name] = flat.reshape(tensor.shape)
    if len(rest):
        raise ProtocolError(
            "read the inputs", expected="as many raw bytes as they name", got=f"{len(rest)} more", fix="Send no more."
        )
    return inputs


def _from_json(doing: str, tensor: _Tensor, data: bytes, count: int) -> Array:
    datatype = tensor.datatype
    try:
        values = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ProtocolError(f"{doing}: data", expected="a list", got="something else") from None
    flat = _flat(doing, values, tensor.shape)
    if len(flat) != count:
        raise ProtocolError(f"{doing}: data", expected=f"{count} elements for shape {tensor.shape}", got=len(flat))
    kinds = {type(value) for value in flat}
    if datatype == "BYTES" and kinds <= {str}:
        return objects(value.encode("utf-8", "surrogatepass") for value in flat)
    if datatype == "BOOL" and kinds <= {bool}:
        return np.array(flat, np.bool_)
    if datatype == "BF16":
        raise ProtocolError(f"{doing}: data", problem="BF16 has no form in JSON", fix="Send it as raw bytes.")
    if datatype in _FLOATS and kinds <= {int, float}:
        return _floats(doing, flat, datatype)
    if datatype in DTYPES and datatype not in _FLOATS and datatype != "BOOL" and kinds <= {int}:
        try:
            return np.array(flat, DTYPES[datatype])
        except OverflowError:
            raise ProtocolError(f"{doing}: data", expected=f"elements within {datatype}", got="a larger one") from None
    raise ProtocolError(
        f"{doing}: data", expected=f"elements of {datatype}", got=", ".join(sorted(kind.__name__ for kind in kinds))
    )


def _floats(doing: str, values: Sequence[float], datatype: str) -> Array:
    try:
        wide = np.array(values, np.float64)
    except OverflowError:
        raise ProtocolError(f"{doing}: data", expected=f"elements within {datatype}", got="a larger one") from None
    with np.errstate(over="ignore"):
        narrow = wide.astype(DTYPES[datatype])
    if not np.isfinite(narrow).all():
        raise ProtocolError(f"{doing}: data", expected=f"elements within {datatype}", got="a larger one")
    return narrow


def _flat(doing: str, values: object, shape: Sequence[int]) -> list[Any]:
    """Elements in a flat list, or in lists nested as the shape says."""
    if not isinstance(values, list):
        raise ProtocolError(f"{doing}: data", expected="a list", got=type(values).__name__)
    if not any(isinstance(value, list) for value in values):
        return values
    level: list[Any] = [values]
    for size in shape:
        inner: list[Any] = []
        for part in level:
            if not isinstance(part, list) or len(part) != size:
                raise ProtocolError(f"{doing}: data", expected=f"lists nested as shape {list(shape)}", got="others")
            inner += part
        level = inner
    return level


def _as_json(name: str, array: Array, datatype: str) -> Any:
    if datatype == "BYTES":
        try:
            return [one.decode() if isinstance(one, bytes) else str(one) for one in array.ravel().tolist()]
        except UnicodeDecodeError:
            raise _no_form(name, "bytes that are no text") from None
    if datatype == "BF16":
        raise _no_form(name, "BF16")
    flat = np.ascontiguousarray(array).ravel()
    if datatype in _FLOATS:
        # JSON has no such numbers, and null would be taken for one.
        if not np.isfinite(flat).all():
            raise _no_form(name, "numbers that are not finite")
        flat = flat.astype(np.float32) if datatype == "FP16" else flat
    return flat


def _no_form(name: str, what: str) -> ProtocolError:
    return ProtocolError(
        f"answer with output {quoted(name)} in JSON",
        expected="elements that JSON has a form for",
        got=what,
        fix="Ask for binary_data.",
    )


def _names(outputs: Sequence[_Output]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for output in outputs:
        doing = f"output {quoted(output.name)}"
        if not output.name or output.name in names:
            raise ProtocolError(doing, problem="it has no name, or is asked for twice")
        parameters = output.parameters or {}
        _refuse(doing, parameters, "shared_memory_region", "tensors in shared memory")
        if parameters.get("classification"):
            _refuse(doing, parameters, "classification", "answers as classification")
        if not isinstance(parameters.get("binary_data", False), bool):
            raise ProtocolError(f"{doing}, binary_data", expected="true or false", got=repr(parameters["binary_data"]))
        names[output.name] = None
    return tuple(names)


def _refuse(doing: str, parameters: Mapping[str, Parameter], key: str, what: str) -> None:
    if key in parameters:
        raise Unsupported(doing, problem=f"this server has no {what}")


def _whole(parameters: Mapping[str, Parameter], key: str) -> int:
    value = parameters.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"parameter {key!r}", expected="a whole number of 0 or more", got=_clipped(repr(value)))
    return value


def _agreed(parameter: Parameter | None, header: str | None) -> str | None:
    if parameter is not None and not isinstance(parameter, str):
        raise ProtocolError("parameter 'adapter'", expected="the name of a task", got=repr(parameter))
    if parameter is not None and header is not None and parameter != header:
        raise ProtocolError(
            "adapter",
            expected="one task for the whole batch",
            got=f"{quoted(parameter)} as parameter and {quoted(header)} as header",
        )
    return parameter if parameter is not None else header


def _clipped(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "..."
