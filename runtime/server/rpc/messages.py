"""Conversion of inference requests and responses between gRPC messages and protocol-independent ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tpeft_deploy.errors import ProtocolError, TooLarge, Unsupported
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.field_limit import join_raw
from tpeft_deploy.runtime.server.rpc.tensors import decode, encode_contents, has_contents
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.messages import InferRequest, InferResponse, Parameter
from tpeft_deploy.runtime.server.v2.tensors import encode_raw, quoted, raw_view
from tpeft_deploy.tucker import Array

__all__ = ["adapter_of", "is_final", "is_raw", "parameters_of", "raw_response", "request_of", "response_of"]

_ADAPTER_KEYS = ("x-adapter", "serve_multiplexed_model_id", "multiplexed_model_id")
_FINAL = "triton_enable_empty_final_response"
_RAW_OUTPUTS = 6  # number of the field raw_output_contents
_INFER_RESPONSE = 2  # number of the field infer_response in ModelStreamInferResponse
_LARGEST = (2 << 30) - (1 << 20)  # protobuf messages are smaller than 2 GiB


def request_of(
    message: pb.ModelInferRequest,
    limits: RpcLimits,
    adapter: str | None = None,
    timeout: float | None = None,
    raws: Sequence[bytes | memoryview] | None = None,
) -> InferRequest:
    """Convert a ModelInferRequest.

    Args:
        message: parsed message.
        limits: limits of tensors.
        adapter: task named by the call's metadata, from `adapter_of`.
        timeout: seconds until the call's deadline; a smaller `timeout` in the message takes precedence.
        raws: raw tensors; None for those in the message.

    Raises:
        ProtocolError: the message violates the protocol.
        TooLarge: a tensor exceeds the limits.
        Unsupported: the request uses shared memory or the classification extension.
    """
    if not message.model_name:
        raise ProtocolError("request", expected="model_name", got="an empty one")
    parameters = parameters_of(message)
    microseconds = _whole(parameters, "timeout")
    if microseconds:
        seconds = microseconds / 1e6
        timeout = seconds if timeout is None else min(seconds, timeout)
    return InferRequest(
        model=message.model_name,
        inputs=_inputs(message, message.raw_input_contents if raws is None else raws, limits),
        version=message.model_version,
        id=message.id,
        outputs=_outputs(message),
        adapter=_agreed([*_name(parameters, "adapter", "a task"), *([] if adapter is None else [adapter])]),
        component=next(iter(_name(parameters, "component", "a component")), None),
        timeout=timeout,
        priority=_whole(parameters, "priority"),
    )


def parameters_of(message: pb.ModelInferRequest) -> dict[str, Parameter]:
    """Return the parameters of a message.

    Raises:
        ProtocolError: a parameter has no value.
    """
    return {key: _value(f"parameter {quoted(key)}", one) for key, one in message.parameters.items()}


def is_final(message: pb.ModelInferRequest) -> bool:
    """Return whether the client of a stream wants the last answer marked."""
    return _FINAL in message.parameters and message.parameters[_FINAL].bool_param


def adapter_of(metadata: Mapping[str, str]) -> str | None:
    """Return the task that a call's metadata name for the whole batch; None if they name none.

    Raises:
        ProtocolError: the metadata name several tasks.
    """
    return _agreed([metadata[key] for key in _ADAPTER_KEYS if key in metadata])


def response_of(response: InferResponse, *, raw: bool, final: bool = False) -> pb.ModelInferResponse:
    """Convert a response to a message.

    Args:
        response: inference response.
        raw: send raw bytes; otherwise typed contents, if all output datatypes have them.
        final: mark the response as the last one to the request.

    Raises:
        TooLarge: the message exceeds the size limit of protobuf.
    """
    _check_size(response)
    raw = is_raw(response, raw)
    message = _head_of(response, final)
    for output, array, datatype in zip(message.outputs, response.outputs.values(), response.datatypes, strict=True):
        if raw:
            message.raw_output_contents.append(encode_raw(array, datatype))
        else:
            output.contents.CopyFrom(encode_contents(array, datatype))
    return message


def raw_response(response: InferResponse, *, final: bool, streamed: bool) -> bytes:
    """Serialise a response with raw outputs, copying each output once.

    Args:
        response: inference response.
        final: mark the response as the last one to the request.
        streamed: wrap the response in a ModelStreamInferResponse.

    Raises:
        TooLarge: the message exceeds the size limit of protobuf.
    """
    _check_size(response)
    raws = [
        raw_view(array, datatype) for array, datatype in zip(response.outputs.values(), response.datatypes, strict=True)
    ]
    head = _head_of(response, final).SerializeToString()
    return join_raw(head, _RAW_OUTPUTS, raws, _INFER_RESPONSE if streamed else None)


def is_raw(response: InferResponse, raw: bool) -> bool:
    """Return whether outputs are sent raw, as requested or because a datatype has no typed contents."""
    return raw or not all(map(has_contents, response.datatypes))


def _check_size(response: InferResponse) -> None:
    size = sum(array.nbytes for array in response.outputs.values())
    if size > _LARGEST:
        raise TooLarge("answer", expected=f"at most {_LARGEST} bytes of outputs over gRPC", got=size)


def _head_of(response: InferResponse, final: bool) -> pb.ModelInferResponse:
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for (name, array), datatype in zip(response.outputs.items(), response.datatypes, strict=True):
        message.outputs.add(name=name, datatype=datatype, shape=array.shape)
    for key, value in response.parameters.items():
        _set(message.parameters[key], value)
    if final:
        message.parameters["triton_final_response"].bool_param = True
    return message


def _inputs(message: pb.ModelInferRequest, given: Sequence[bytes | memoryview], limits: RpcLimits) -> dict[str, Array]:
    raws: Iterable[bytes | memoryview | None] = given
    if not given:
        raws = [None] * len(message.inputs)
    elif len(given) != len(message.inputs):
        got = f"{len(given)} for {len(message.inputs)} inputs"
        raise ProtocolError("request", expected="raw_input_contents for all inputs or for none", got=got)
    inputs: dict[str, Array] = {}
    for tensor, raw in zip(message.inputs, raws, strict=True):
        doing = f"input {quoted(tensor.name)}"
        if not tensor.name or tensor.name in inputs:
            raise ProtocolError(doing, problem="it has no name, or that of another input")
        _refuse(doing, tensor.parameters, "shared_memory_region", "tensors in shared memory")
        if raw is not None and tensor.contents.ListFields():
            raise ProtocolError(doing, expected="raw contents or typed ones", got="both")
        inputs[tensor.name] = decode(tensor, raw, limits)
    return inputs


def _outputs(message: pb.ModelInferRequest) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for output in message.outputs:
        doing = f"output {quoted(output.name)}"
        if not output.name or output.name in names:
            raise ProtocolError(doing, problem="it has no name, or is asked for twice")
        _refuse(doing, output.parameters, "shared_memory_region", "tensors in shared memory")
        _refuse(doing, output.parameters, "classification", "answers as classification")
        names[output.name] = None
    return tuple(names)


def _refuse(doing: str, parameters: Mapping[str, pb.InferParameter], key: str, what: str) -> None:
    if key in parameters:
        raise Unsupported(doing, problem=f"this server has no {what}")


def _value(doing: str, parameter: pb.InferParameter) -> Parameter:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise ProtocolError(doing, expected="a value", got="none")
    value: Parameter = getattr(parameter, kind)
    return value


def _whole(parameters: Mapping[str, Parameter], key: str) -> int:
    value = parameters.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        shown = quoted(value) if isinstance(value, str) else value
        raise ProtocolError(f"parameter {key!r}", expected="a whole number of 0 or more", got=shown)
    return value


def _name(parameters: Mapping[str, Parameter], key: str, what: str) -> list[str]:
    if key not in parameters:
        return []
    value = parameters[key]
    if not isinstance(value, str):
        raise ProtocolError(f"parameter {key!r}", expected=f"the name of {what}", got=value)
    return [value]


def _agreed(names: list[str]) -> str | None:
    if len(set(names)) > 1:
        got = ", ".join(map(quoted, names))
        raise ProtocolError("adapter", expected="one task for the whole batch", got=got)
    return names[0] if names else None


def _set(parameter: pb.InferParameter, value: Parameter) -> None:
    # bool before int, as bool is a subclass of int.
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value
