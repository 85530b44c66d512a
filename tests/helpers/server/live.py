"""The whole server over HTTP, on a free port, in a thread of the test process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tests.helpers.server.asking import Asking
from tests.server.conftest import Served, serve
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.rest.app import application
from tpeft_deploy.runtime.server.v2.limits import RestLimits


class Live(Asking):
    """A server on a port of its own, and keys to it."""

    def __init__(self, own: Served, port: int) -> None:
        who = [("acme", "infer"), ("acme", "deploy"), ("rival", "infer"), ("rival", "deploy"), ("operator", "admin")]
        super().__init__(port, {(one, role): own.state.keys.create(one, role, by="a test")[1] for one, role in who})
        self.served = own
        self.exchanges: list[RequestContext] = []


@contextmanager
def running(own: Served) -> Iterator[Live]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer of two parts takes 40 ms
        live = Live(own, listener.getsockname()[1])
        app = application(own.service, RestLimits(), live.exchanges.append)
        config = uvicorn.Config(app, log_level="warning", loop="uvloop", http="httptools", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with live.client:
            yield live
        server.should_exit = True
        thread.join()


@contextmanager
def serving_bundle(bundle: Bundle, place: Path) -> Iterator[Live]:
    """Serve a bundle on a port, until the block ends."""
    own = serve(bundle, place)
    try:
        with running(own) as live:
            yield live
    finally:
        own.runtime.close()
        own.state.close()
