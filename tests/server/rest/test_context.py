from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import orjson
import pytest
from starlette.requests import ClientDisconnect

from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.server.openai.sse import DONE, EventStream, event
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits


class Stream:
    """Events of a request, and what is sent of them."""

    def __init__(self, *events: bytes | Exception) -> None:
        self.events = events
        self.closed = False
        self.sent: list[MutableMapping[str, Any]] = []
        core: Any = None
        scope = {"headers": [], "method": "POST", "path": "/v1/completions"}
        self.context = HttpContext(core, RestLimits(), Intake(), scope, self.receive)

    async def parts(self) -> AsyncGenerator[bytes]:
        try:
            for each in self.events:
                if isinstance(each, Exception):
                    raise each
                yield each
            await asyncio.Event().wait()  # until it is cancelled
        finally:
            self.closed = True

    async def receive(self) -> MutableMapping[str, Any]:
        raise AssertionError

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)

    async def run(self, send: Any = None) -> None:
        await self.context.send_events(send or self.send, await EventStream.begun(self.parts()))

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    def error(self) -> Any:
        assert self.sent[-1]["more_body"] is False
        return orjson.loads(self.sent[-1]["body"].removeprefix(b"data: "))["error"]


def test_an_error_in_a_stream_is_its_last_event() -> None:
    own = Stream(b"", event({"a": 1}), RunError("generate tokens", problem="the runtime is closed"))
    asyncio.run(own.run())
    assert own.sent[0]["status"] == 200
    assert own.sent[1]["body"] == b'data: {"a":1}\n\n'
    assert own.error()["type"] == "server_error"
    assert own.closed


def test_a_stream_that_the_server_ends_says_so() -> None:
    own = Stream(DONE)

    async def run() -> None:
        task = asyncio.create_task(own.run())
        while not own.sent[1:]:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert own.error()["code"] == "service_unavailable"
    assert own.closed


def test_a_closed_connection_ends_what_makes_the_stream() -> None:
    own = Stream(b"a", b"b")

    async def send(message: MutableMapping[str, Any]) -> None:
        await own.send(message)
        if message.get("body") == b"b":
            raise RuntimeError("closed")

    with pytest.raises(ClientDisconnect):
        asyncio.run(own.run(send))
    assert own.closed
    assert own.body == b"ab"
