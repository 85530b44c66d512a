"""Generation over a stream of gRPC: one request, an answer for each piece of text, as Triton's decoupled models."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec

from tpeft_deploy.errors import ProtocolError
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.server.openai.endpoints import completion_requests
from tpeft_deploy.runtime.server.openai.reading import INLINE, SCRATCH
from tpeft_deploy.runtime.server.operations.generation import memory_of
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.context import RpcContext
from tpeft_deploy.runtime.server.rpc.messages import adapter_of, is_final, parameters_of, request_of
from tpeft_deploy.runtime.server.v2.generate import TEXT_INPUT, TEXT_OUTPUT, GenerateBody, generate_body
from tpeft_deploy.runtime.server.v2.messages import InferRequest
from tpeft_deploy.runtime.server.v2.tensors import quoted
from tpeft_deploy.tucker import Array

__all__ = ["generated", "generates"]


def generates(message: pb.ModelInferRequest) -> bool:
    """Return whether a message asks for text: it has an input `text_input` of datatype BYTES."""
    return any(tensor.name == TEXT_INPUT and tensor.datatype == "BYTES" for tensor in message.inputs)


async def generated(call: RpcContext, message: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelStreamInferResponse]:
    """Yield the answers to a message: pieces of text, and the empty last one if the client asked for it.

    Raises:
        TpeftError: the message is refused, or the sequence failed.
    """
    generations = call.core.generations
    final = is_final(message)
    large = call.heavy or call.raws is not None or call.bytes_in > INLINE
    call.memory.take(SCRATCH * call.bytes_in if large else 0)
    run = call.intake.offload.run
    asked, body = await run(call.tenant, _read, call, message) if large else _read(call, message)
    del message
    body.check()
    large |= body.schema is not None
    target = generations.target(call.principal, asked.model, asked.version, asked.adapter or body.address[2])
    text = await generations.text()
    given: tuple[Any, ...] = (text, generations, body)
    [request] = await run(call.tenant, completion_requests, *given) if large else completion_requests(*given)
    call.memory.resize(call.bytes_in + memory_of([request]))
    head = {"model_name": asked.model, "model_version": target.version, "id": asked.id}
    trace = call.traceparent
    async with generations.started(call.principal, target, [_limited(request, asked)], trace) as [handle]:
        if body.stream is False:
            result = await asyncio.wrap_future(handle.future)
            yield _answer(head, result.text)
        else:
            async with aclosing(aiter(handle)) as tokens:
                async for token in tokens:
                    if token.text:
                        yield _answer(head, token.text)
    if final:
        yield _answer(head, None)


def _read(call: RpcContext, message: pb.ModelInferRequest) -> tuple[InferRequest, GenerateBody]:
    asked = request_of(message, call.limits, adapter_of(call.metadata), call.deadline, call.raws or None)
    if not set(asked.outputs) <= {TEXT_OUTPUT}:
        raise ProtocolError(
            "request", expected=f"the output {TEXT_OUTPUT!r}", got=", ".join(map(quoted, asked.outputs))
        )
    fields = {name: _value(name, array) for name, array in asked.inputs.items()}
    given = {"prompt": fields.pop(TEXT_INPUT), "model": asked.model, "version": asked.version, "stream_options": None}
    return msgspec.structs.replace(asked, inputs={}), generate_body({**parameters_of(message), **fields}, **given)


def _value(name: str, array: Array) -> Any:
    if array.size != 1:
        raise ProtocolError(f"input {quoted(name)}", expected="one element", got=array.size)
    value = array.reshape(-1)[0]
    if not isinstance(value, bytes):
        return value.item()
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"input {quoted(name)}", expected="text in UTF-8", got="other bytes") from None


def _limited(request: GenerationRequest, asked: InferRequest) -> GenerationRequest:
    deadline = math.inf if asked.timeout is None else time.monotonic() + asked.timeout
    return replace(request, deadline=deadline, priority=asked.priority)


def _answer(head: dict[str, Any], text: str | None) -> pb.ModelStreamInferResponse:
    """Return an answer with a piece of text; None for the last answer, which has none."""
    found = pb.ModelInferResponse(**head)
    found.parameters["triton_final_response"].bool_param = text is None
    if text is not None:
        data = text.encode()
        found.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])
        found.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
    return pb.ModelStreamInferResponse(infer_response=found)
