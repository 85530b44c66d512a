"""A gRPC server on an event loop in a thread of its own, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from tests.server.fake_rpc_core import FakeCore
from tpeft_deploy.runtime.server.exchange import Exchange
from tpeft_deploy.runtime.server.rpc.limits import Limits
from tpeft_deploy.runtime.server.rpc.server import RpcServer, Tls
from tpeft_deploy.runtime.server.rpc.servicer import Servicer


@dataclass(frozen=True)
class Serving:
    """A running server: its address, what it asks, and what it told of its calls."""

    address: str
    core: FakeCore
    exchanges: list[Exchange]


@contextlib.contextmanager
def serving(limits: Limits | None = None, tls: Tls | None = None) -> Iterator[Serving]:
    limits = limits or Limits()
    core = FakeCore()
    exchanges: list[Exchange] = []
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
        assert ready.wait(20)
        yield Serving(f"127.0.0.1:{port}", core, exchanges)
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(20)
        assert not thread.is_alive()
