"""Parser of the JSON of an inference request: inputs, requested outputs, and response format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.rest.json_data import Block
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.messages import Parameter
from tpeft_deploy.runtime.server.v2.tensors import DTYPES, check_shape, check_size, objects, quoted
from tpeft_deploy.tucker import Array

__all__ = ["FLOATS", "Head", "Input", "head_of"]

FLOATS = {"FP16", "FP32", "FP64"}


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


class Input(msgspec.Struct, frozen=True):
    """An input tensor of a request.

    Attributes:
        name: name of the input.
        datatype: V2 datatype.
        shape: shape, checked against the limits.
        count: number of elements.
        size: bytes of raw data after the JSON.
        elements: flat elements if they are in the JSON.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    count: int
    size: int = 0
    elements: Array | None = None


class Head(msgspec.Struct, frozen=True):
    """Parsed JSON of an inference request.

    Attributes:
        inputs: inputs in the order of their raw data.
        outputs: names of the requested outputs, in order; empty means all.
        model_name: model name, if the JSON repeats it.
        id: request id set by the client.
        adapter: parameter `adapter`.
        component: parameter `component`.
        timeout: timeout in seconds; None means no timeout.
        priority: request priority; 0 by default.
        raw: whether outputs missing from `chosen` are sent raw.
        chosen: output name -> whether the output is sent raw.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    model_name: str | None
    id: str
    adapter: str | None
    component: str | None
    timeout: float | None
    priority: int
    raw: bool
    chosen: Mapping[str, bool]


def head_of(model: str, text: bytes, limits: RestLimits, blocks: Mapping[bytes, Block] | None = None) -> Head:
    """Parse and validate the JSON of a request for a model.

    Args:
        model: model name in the path.
        text: JSON of the request.
        limits: limits of tensors.
        blocks: placeholder in the JSON -> tensor data that was cut out of it.

    Raises:
        ProtocolError: the JSON violates the protocol.
        TooLarge: a tensor exceeds the limits.
        Unsupported: the request uses shared memory or the classification extension.
    """
    doing = f"read a request for model {quoted(model)}"
    blocks = blocks or {}
    try:
        parsed = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(doing, problem=_clipped(str(error))) from None
    except RecursionError:
        raise ProtocolError(doing, problem="it is nested too deeply") from None
    outputs = parsed.outputs or []
    if len(parsed.inputs) + len(outputs) > limits.tensors:
        raise TooLarge(
            doing,
            expected=f"at most {limits.tensors} inputs and outputs",
            got=len(parsed.inputs) + len(outputs),
        )
    if not blocks.keys() <= {bytes(tensor.data) for tensor in parsed.inputs}:
        raise ProtocolError(doing, expected="data of inputs only", got="a list of that name elsewhere")
    parameters = parsed.parameters or {}
    chosen = {
        output.name: bool(output.parameters["binary_data"])
        for output in outputs
        if output.parameters and "binary_data" in output.parameters
    }
    return Head(
        inputs=_inputs(parsed.inputs, limits, blocks),
        outputs=_names(outputs),
        model_name=parsed.model_name,
        id=parsed.id or "",
        adapter=_name(parameters, "adapter", "a task"),
        component=_name(parameters, "component", "a component"),
        timeout=_whole(parameters, "timeout") / 1e6 or None,
        priority=_whole(parameters, "priority"),
        raw=bool(parameters.get("binary_data_output", False)),
        chosen=chosen,
    )


def _inputs(tensors: Sequence[_Tensor], limits: RestLimits, blocks: Mapping[bytes, Block]) -> tuple[Input, ...]:
    inputs: dict[str, Input] = {}
    for tensor in tensors:
        doing = f"input {quoted(tensor.name)}"
        if not tensor.name or tensor.name in inputs:
            raise ProtocolError(doing, problem="it has no name, or that of another input")
        parameters = tensor.parameters or {}
        _refuse(doing, parameters, "shared_memory_region", "tensors in shared memory")
        count = check_shape(doing, tensor.shape, tensor.datatype, limits)
        data = bytes(tensor.data)
        shape = tuple(tensor.shape)
        size = parameters.get("binary_data_size")
        if size is None:
            if not data:
                raise ProtocolError(doing, expected="data, or a parameter binary_data_size", got="neither")
            flat = _from_json(doing, tensor, data, count, blocks.get(data))
            inputs[tensor.name] = Input(tensor.name, tensor.datatype, shape, count, elements=flat)
            continue
        if data:
            raise ProtocolError(doing, expected="data or binary_data_size", got="both")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ProtocolError(f"{doing}, binary_data_size", expected="a number of bytes", got=_clipped(repr(size)))
        check_size(doing, tensor.datatype, count, size)
        inputs[tensor.name] = Input(tensor.name, tensor.datatype, shape, count, size)
    return tuple(inputs.values())


def _from_json(doing: str, tensor: _Tensor, data: bytes, count: int, block: Block | None) -> Array:
    if block is not None and tensor.datatype in DTYPES:
        convert = partial(_elements, doing, tensor.datatype)
        return block.flat(doing, tensor.shape, count, DTYPES[tensor.datatype], convert)
    try:
        values = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ProtocolError(f"{doing}: data", expected="a list", got="something else") from None
    flat = _flat(doing, values, tensor.shape)
    if len(flat) != count:
        raise ProtocolError(f"{doing}: data", expected=f"{count} elements for shape {tensor.shape}", got=len(flat))
    return _elements(doing, tensor.datatype, flat)


def _elements(doing: str, datatype: str, flat: Sequence[Any]) -> Array:
    kinds = set(map(type, flat))
    if datatype == "BYTES" and kinds <= {str}:
        return objects(value.encode("utf-8", "surrogatepass") for value in flat)
    if datatype == "BOOL" and kinds <= {bool}:
        return np.array(flat, np.bool_)
    if datatype == "BF16":
        raise ProtocolError(f"{doing}: data", problem="BF16 has no form in JSON", fix="Send it as raw bytes.")
    if datatype in FLOATS and kinds <= {int, float}:
        return _floats(doing, flat, datatype)
    if datatype in DTYPES and datatype not in FLOATS and datatype != "BOOL" and kinds <= {int}:
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
    """Return the elements of a flat list, or of lists nested according to the shape, as a flat list."""
    if not shape and not isinstance(values, list):
        return [values]
    if not isinstance(values, list):
        raise ProtocolError(f"{doing}: data", expected="a list", got=type(values).__name__)
    if list not in set(map(type, values)):
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


def _name(parameters: Mapping[str, Parameter], key: str, what: str) -> str | None:
    value = parameters.get(key)
    if value is not None and not isinstance(value, str):
        raise ProtocolError(f"parameter {key!r}", expected=f"the name of {what}", got=repr(value))
    return value


def _clipped(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "..."
