"""gRPC calls without a network: the test decides when a message arrives, and reads the status."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np

from tests.helpers.server.fake_rpc_core import X
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.runtime.server.rpc.servicer import Servicer

MIB = 1 << 20


class Aborted(Exception):
    """Raised by `Context.abort`."""


class Context:
    """A call whose message comes when `sent` says so."""

    def __init__(self, message: bytes | None = None) -> None:
        self.message = message
        self.sent = asyncio.Event()
        self.reads = 0
        self.written: list[bytes] = []
        self.status = ""
        self.trailers: Any = ()

    def time_remaining(self) -> None:
        return None

    async def read(self) -> Any:
        self.reads += 1
        if self.message is None:
            await self.sent.wait()
        return grpc.aio.EOF if self.message is None else self.message

    async def write(self, message: bytes) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, text: str, trailers: Any = ()) -> None:
        self.status, self.trailers = code.name, trailers
        raise Aborted


async def answered(servicer: Servicer, context: Context, rpc: str = "ModelInfer", key: str = "acme-infer") -> str:
    details = SimpleNamespace(method=f"/{SERVICE}/{rpc}", invocation_metadata=(("authorization", f"Bearer {key}"),))
    handler = servicer.service(details).stream_stream
    try:
        await handler(None, context)
    except Aborted:
        return context.status
    return "OK"


def infer(rows: int = 4, model: str = "alpha", *, raw: bool = True) -> pb.ModelInferRequest:
    array = np.resize(X, (rows, X.shape[1]))
    message = pb.ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name="x", datatype="FP32", shape=array.shape)
    if raw:
        message.raw_input_contents.append(array.tobytes())
    else:
        tensor.contents.fp32_contents.extend(array.ravel().tolist())
    return message
