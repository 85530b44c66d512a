"""gRPC servers for tests: on an event loop in a thread of its own, or on the test's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from tests.helpers.server.fake_rpc_core import FakeCore, X
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.runtime.server.rpc.server import RpcServer, Tls
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.tucker import Array


@dataclass(frozen=True)
class Serving:
    """A running server: its address, what it asks, and what it told of its calls."""

    address: str
    core: Any
    exchanges: list[RequestContext]


@contextlib.contextmanager
def serving(
    limits: RpcLimits | None = None, tls: Tls | None = None, service: Service | None = None
) -> Iterator[Serving]:
    limits = limits or RpcLimits()
    core: Any = service or FakeCore()
    exchanges: list[RequestContext] = []
    ready = threading.Event()
    port = 0
    loop: asyncio.AbstractEventLoop
    done: asyncio.Event

    async def serve() -> None:
        nonlocal port, loop, done
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        server = RpcServer(Servicer(core, limits, exchanges.append), limits, host="127.0.0.1", port=0, tls=tls)
        port = server.port
        await server.start()
        ready.set()
        await done.wait()
        await server.stop(0.2)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(100)
        yield Serving(f"127.0.0.1:{port}", core, exchanges)
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(100)
        assert not thread.is_alive()


def key_of(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@dataclass(frozen=True)
class Talking:
    """A server and a channel to it, on one event loop."""

    channel: Any
    core: FakeCore
    exchanges: list[RequestContext]
    server: RpcServer

    def begin(
        self,
        rpc: str,
        message: Message | bytes,
        key: str | None = "acme-deploy",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = 100,
    ) -> Any:
        """A call that has begun; its answer is bytes."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        path = rpc if rpc.startswith("/") else f"/{SERVICE}/{rpc}"
        keys = () if key is None else key_of(key)
        return self.channel.unary_unary(path)(data, metadata=(*keys, *metadata), timeout=timeout)

    def stream(self, key: str | None = "acme-deploy", timeout: float | None = 100) -> Any:
        keys = () if key is None else key_of(key)
        return self.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(metadata=keys, timeout=timeout)

    async def status(
        self,
        rpc: str,
        message: Message | bytes = b"",
        key: str | None = "acme-deploy",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = 100,
    ) -> str:
        """Name of the status that a call ends with."""
        return str((await self.begin(rpc, message, key, metadata, timeout).code()).name)


@contextlib.asynccontextmanager
async def talking(limits: RpcLimits | None = None, intake: Intake | None = None) -> AsyncIterator[Talking]:
    limits = limits or RpcLimits()
    core = FakeCore()
    exchanges: list[RequestContext] = []
    server = RpcServer(Servicer(core, limits, exchanges.append, intake), limits, host="127.0.0.1", port=0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Talking(channel, core, exchanges, server)
    finally:
        await server.stop(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 200))


def infer(model: str = "alpha", rows: int = 4, **fields: Any) -> pb.ModelInferRequest:
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 3]}
    raw = [X[:rows].tobytes()]
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=raw, **fields)


def scores(answer: bytes) -> Array:
    message = pb.ModelInferResponse.FromString(answer)
    assert [one.name for one in message.outputs] == ["scores", "label"]
    return np.frombuffer(message.raw_output_contents[0], np.float32).reshape(message.outputs[0].shape)


NOT_OURS = [
    *(f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")),
    "TraceSetting",
    "LogSettings",
    "NoSuchCall",
]
