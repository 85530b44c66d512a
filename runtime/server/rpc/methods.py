"""Table of the rpcs: required action, request type and handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from google.protobuf.message import Message

from tpeft_deploy.errors import ProtocolError
from tpeft_deploy.runtime.server.operations.slices import in_slices
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.context import RpcContext
from tpeft_deploy.runtime.server.rpc.messages import adapter_of, is_final, is_raw, raw_response, request_of, response_of
from tpeft_deploy.runtime.server.tenancy.access import Action
from tpeft_deploy.runtime.server.v2.messages import InferResponse, LoadParameter
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["METHODS", "SERVICE", "Method"]

SERVICE = "inference.GRPCInferenceService"


@dataclass(frozen=True)
class Method:
    """An rpc.

    Attributes:
        action: action that the role must allow.
        request: request message type.
        answer: handler; returns a message or serialised bytes.
        stream: whether requests and responses are streams.
    """

    action: Action
    request: Any
    answer: Callable[[RpcContext, Any], Awaitable[Message | bytes]]
    stream: bool = False


async def _server_live(call: RpcContext, _: pb.ServerLiveRequest) -> Message:
    return pb.ServerLiveResponse(live=call.core.live())


async def _server_ready(call: RpcContext, _: pb.ServerReadyRequest) -> Message:
    return pb.ServerReadyResponse(ready=call.core.ready())


async def _server_metadata(call: RpcContext, _: pb.ServerMetadataRequest) -> Message:
    document = call.core.server_metadata(call.principal)
    return pb.ServerMetadataResponse(**{field: document[field] for field in ("name", "version", "extensions")})


async def _model_ready(call: RpcContext, request: pb.ModelReadyRequest) -> Message:
    return pb.ModelReadyResponse(ready=call.core.model_ready(call.principal, request.name, request.version))


async def _model_metadata(call: RpcContext, request: pb.ModelMetadataRequest) -> Message:
    return pb.ModelMetadataResponse(**call.core.model_metadata(call.principal, request.name, request.version))


async def _model_config(call: RpcContext, request: pb.ModelConfigRequest) -> Message:
    config = call.core.model_config(call.principal, request.name, request.version)
    return pb.ModelConfigResponse(config=pb.ModelConfig(**config))


async def _model_statistics(call: RpcContext, request: pb.ModelStatisticsRequest) -> Message:
    found = await call.core.statistics(call.principal, request.name, request.version)
    response = pb.ModelStatisticsResponse()
    await in_slices(found["model_stats"], lambda own: response.model_stats.add(**own))
    return response


async def _model_infer(call: RpcContext, message: pb.ModelInferRequest) -> Message | bytes:
    adapter = adapter_of(call.metadata)
    heavy = call.heavy or (call.raws is not None and any(one.datatype == "BYTES" for one in message.inputs))
    given = message, call.limits, adapter, call.deadline, call.raws or None
    request = await call.intake.offload.run(call.tenant, request_of, *given) if heavy else request_of(*given)
    if call.traceparent:
        request = msgspec.structs.replace(request, traceparent=call.traceparent)
    # Clients that send raw tensors can read them; without any input the response is raw, which every client reads.
    raw = bool(call.raws) or bool(message.raw_input_contents) or not message.inputs
    final = call.streamed and is_final(message)
    del message, given
    return await _response(call, await call.core.infer(call.principal, request), raw, final)


async def _response(call: RpcContext, response: InferResponse, raw: bool, final: bool) -> Message | bytes:
    """Encode a response, after reserving memory for it."""
    size = sum(array.nbytes for array in response.outputs.values())
    call.memory.take(size)
    if size > PIECE and is_raw(response, raw):
        return raw_response(response, final=final, streamed=call.streamed)
    if size > PIECE:
        call.memory.take(4 * size)
        message = await call.intake.offload.run(call.tenant, response_of, response, raw=False, final=final)
    else:
        message = response_of(response, raw=raw, final=final)
    return pb.ModelStreamInferResponse(infer_response=message) if call.streamed else message


async def _repository_index(call: RpcContext, request: pb.RepositoryIndexRequest) -> Message:
    response = pb.RepositoryIndexResponse()
    models = await call.core.index(call.principal, ready=request.ready)
    await in_slices(models, lambda own: response.models.add(**own))
    return response


async def _model_load(call: RpcContext, request: pb.RepositoryModelLoadRequest) -> Message:
    await call.core.load(call.principal, _named(request.model_name), _parameters(request.parameters))
    return pb.RepositoryModelLoadResponse()


async def _model_unload(call: RpcContext, request: pb.RepositoryModelUnloadRequest) -> Message:
    await call.core.unload(call.principal, _named(request.model_name), _parameters(request.parameters))
    return pb.RepositoryModelUnloadResponse()


def _named(model: str) -> str:
    if not model:
        raise ProtocolError("request", expected="model_name", got="an empty one")
    return model


def _parameters(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> dict[str, LoadParameter]:
    """Convert load parameters; files are raw bytes here, base64 over REST."""
    found: dict[str, LoadParameter] = {}
    for key, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise ProtocolError(f"parameter {quoted(key)}", expected="a value", got="none")
        found[key] = getattr(parameter, kind)
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
    "ModelStreamInfer": Method(Action.INFER, pb.ModelInferRequest, _model_infer, stream=True),
    "RepositoryIndex": Method(Action.READ, pb.RepositoryIndexRequest, _repository_index),
    "RepositoryModelLoad": Method(Action.DEPLOY, pb.RepositoryModelLoadRequest, _model_load),
    "RepositoryModelUnload": Method(Action.DEPLOY, pb.RepositoryModelUnloadRequest, _model_unload),
}
