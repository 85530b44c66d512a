"""Every rpc that this server answers, what it needs a key for, and how it asks the core."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from google.protobuf.message import Message

from tpeft_deploy.errors import ProtocolError, Unauthenticated
from tpeft_deploy.runtime.server.access import Action, Principal
from tpeft_deploy.runtime.server.core import Core
from tpeft_deploy.runtime.server.elements import quoted
from tpeft_deploy.runtime.server.messages import Parameter
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.limits import Limits
from tpeft_deploy.runtime.server.rpc.translation import adapter_of, request_of, response_of

__all__ = ["METHODS", "SERVICE", "Call", "Method"]

SERVICE = "inference.GRPCInferenceService"
_FINAL = "triton_enable_empty_final_response"


@dataclass
class Call:
    """What a method knows beside its message.

    Attributes:
        core: what it asks.
        limits: on messages.
        caller: who asks; None for calls that need no key.
        metadata: keys in lower case; without those whose values are bytes.
        timeout: seconds left until the client's deadline; None: it set none.
        streamed: whether the message is one of a stream.
    """

    core: Core
    limits: Limits
    caller: Principal | None
    metadata: Mapping[str, str]
    timeout: float | None = None
    streamed: bool = False

    @property
    def principal(self) -> Principal:
        """Who asks.

        Raises:
            Unauthenticated: nobody known.
        """
        if self.caller is None:
            raise Unauthenticated("request", expected="a key", got="none")
        return self.caller


@dataclass(frozen=True)
class Method:
    """An rpc.

    Attributes:
        action: what its caller must be allowed to do.
        request: class of its messages.
        answer: the answer to one of them.
        stream: whether they come, and are answered, as streams.
    """

    action: Action
    request: Any
    answer: Callable[[Call, Any], Awaitable[Message]]
    stream: bool = False


async def _server_live(call: Call, _: pb.ServerLiveRequest) -> Message:
    return pb.ServerLiveResponse(live=call.core.live())


async def _server_ready(call: Call, _: pb.ServerReadyRequest) -> Message:
    return pb.ServerReadyResponse(ready=call.core.ready())


async def _server_metadata(call: Call, _: pb.ServerMetadataRequest) -> Message:
    document = call.core.server_metadata(call.principal)
    return pb.ServerMetadataResponse(**{field: document[field] for field in ("name", "version", "extensions")})


async def _model_ready(call: Call, request: pb.ModelReadyRequest) -> Message:
    return pb.ModelReadyResponse(ready=call.core.model_ready(call.principal, request.name, request.version))


async def _model_metadata(call: Call, request: pb.ModelMetadataRequest) -> Message:
    return pb.ModelMetadataResponse(**call.core.model_metadata(call.principal, request.name, request.version))


async def _model_config(call: Call, request: pb.ModelConfigRequest) -> Message:
    config = call.core.model_config(call.principal, request.name, request.version)
    return pb.ModelConfigResponse(config=pb.ModelConfig(**config))


async def _model_statistics(call: Call, request: pb.ModelStatisticsRequest) -> Message:
    return pb.ModelStatisticsResponse(**call.core.statistics(call.principal, request.name, request.version))


async def _model_infer(call: Call, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
    request = request_of(message, call.limits, adapter_of(call.metadata), call.timeout)
    if "traceparent" in call.metadata:
        request = msgspec.structs.replace(request, traceparent=call.metadata["traceparent"])
    # A client that sends raw bytes reads such; one that sent no tensor has said nothing, and raw is what all read.
    raw = bool(message.raw_input_contents) or not message.inputs
    final = call.streamed and _FINAL in message.parameters and message.parameters[_FINAL].bool_param
    return response_of(await call.core.infer(call.principal, request), raw=raw, final=final)


async def _model_stream_infer(call: Call, message: pb.ModelInferRequest) -> Message:
    return pb.ModelStreamInferResponse(infer_response=await _model_infer(call, message))


async def _repository_index(call: Call, request: pb.RepositoryIndexRequest) -> Message:
    return pb.RepositoryIndexResponse(models=call.core.index(call.principal, ready=request.ready))


async def _model_load(call: Call, request: pb.RepositoryModelLoadRequest) -> Message:
    await call.core.load(call.principal, _named(request.model_name), _parameters(request.parameters))
    return pb.RepositoryModelLoadResponse()


async def _model_unload(call: Call, request: pb.RepositoryModelUnloadRequest) -> Message:
    await call.core.unload(call.principal, _named(request.model_name), _parameters(request.parameters))
    return pb.RepositoryModelUnloadResponse()


def _named(model: str) -> str:
    if not model:
        raise ProtocolError("request", expected="model_name", got="an empty one")
    return model


def _parameters(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> dict[str, Parameter]:
    """Files come as bytes here and in base64 over REST; the core takes the latter."""
    found: dict[str, Parameter] = {}
    for key, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise ProtocolError(f"parameter {quoted(key)}", expected="a value", got="none")
        value = getattr(parameter, kind)
        found[key] = base64.b64encode(value).decode() if kind == "bytes_param" else value
    return found


METHODS: Mapping[str, Method] = {
    "ServerLive": Method(Action.HEALTH, pb.ServerLiveRequest, _server_live),
    "ServerReady": Method(Action.HEALTH, pb.ServerReadyRequest, _server_ready),
    "ServerMetadata": Method(Action.READ, pb.ServerMetadataRequest, _server_metadata),
    "ModelReady": Method(Action.READ, pb.ModelReadyRequest, _model_ready),
    "ModelMetadata": Method(Action.READ, pb.ModelMetadataRequest, _model_metadata),
    "ModelConfig": Method(Action.READ, pb.ModelConfigRequest, _model_config),
    "ModelStatistics": Method(Action.READ, pb.ModelStatisticsRequest, _model_statistics),
    "ModelInfer": Method(Action.INFER, pb.ModelInferRequest, _model_infer),
    "ModelStreamInfer": Method(Action.INFER, pb.ModelInferRequest, _model_stream_infer, stream=True),
    "RepositoryIndex": Method(Action.READ, pb.RepositoryIndexRequest, _repository_index),
    "RepositoryModelLoad": Method(Action.DEPLOY, pb.RepositoryModelLoadRequest, _model_load),
    "RepositoryModelUnload": Method(Action.DEPLOY, pb.RepositoryModelUnloadRequest, _model_unload),
}
