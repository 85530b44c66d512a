"""Large bodies, received into one buffer: whole, aligned, and the next request behind them."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import uvicorn
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from tpeft_deploy.runtime.server.rest.transport import connection
from tpeft_deploy.runtime.server.rest.transport.connection import READ_BODY
from tpeft_deploy.runtime.server.rest.transport.seats import Patience, Seats

T = TypeVar("T")
HEAD_BYTES = 11  # before the first tensor; odd, so that nothing is aligned by luck
READING: list[asyncio.Task[None]] = []  # requests whose body is being read
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


async def digests(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size and the digest of a body, however long, and whether its tensors were aligned."""
    message = await receive()
    body, declared = message["body"], int(dict(scope["headers"])[b"content-length"])
    aligned = True
    if message["more_body"]:
        READING.append(cast("asyncio.Task[None]", asyncio.current_task()))
        try:
            body = await scope["extensions"][READ_BODY](body, declared, HEAD_BYTES)
        finally:
            READING.clear()
        aligned = np.frombuffer(body, np.uint8)[HEAD_BYTES:].ctypes.data % 64 == 0
    if len(body) < declared:
        raise ConnectionError("the client has left")
    answer = f"{len(body)} {hashlib.sha256(body).hexdigest()} {aligned}\n".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


class Connection(connection.Connection):
    """One that says when it is lost."""

    lost = False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost = True


def request(body: bytes) -> bytes:
    return b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def line(body: bytes) -> bytes:
    return f"{len(body)} {hashlib.sha256(body).hexdigest()} True".encode()


@asynccontextmanager
async def connected(
    certificate: Path | None = None,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's streams to a `Connection` of this event loop."""
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(digests, interface="asgi3", proxy_headers=False, ws="none", lifespan="off", log_config=None)
    seats = Seats(Patience())
    own = Connection(
        seats, seats.arrive("192.0.2.1"), config=config, server_state=ServerState(), app_state={}, _loop=loop
    )
    near, far = socket.socketpair()
    near.setblocking(False)
    tls: dict[str, Any] = {}
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
        tls = {"ssl": ssl.create_default_context(cafile=str(certificate / "cert.pem")), "server_hostname": "localhost"}
    serving = loop.create_task(loop.connect_accepted_socket(lambda: own, near, ssl=context))
    reader, writer = await asyncio.open_connection(sock=far, **tls)
    await serving
    try:
        yield reader, writer
    finally:
        writer.close()
        while not own.lost:
            await asyncio.sleep(0.001)


async def lines(bodies: Sequence[bytes], cuts: Iterable[int], certificate: Path | None = None) -> list[bytes]:
    """The answers to requests that arrive on one connection, cut into pieces of so many bytes."""
    sent = b"".join(map(request, bodies))
    async with connected(certificate) as (reader, writer):

        async def send() -> None:
            at = 0
            for cut in [*cuts, len(sent)]:
                writer.write(sent[at : at + cut])
                await writer.drain()
                await asyncio.sleep(0)
                at += cut

        sending = asyncio.create_task(send())
        found = [await answer(reader) for _ in bodies]
        await sending
    return found


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return (await reader.readline()).strip()


def run(work: Coroutine[Any, Any, T], loop: str) -> T:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(work)


def body(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 20, 70_000, 300_000]), min_size=1, max_size=5),
    st.lists(st.integers(1, 200_000), max_size=12),
    st.sampled_from(sorted(LOOPS)),
)
def test_bodies_are_whole_however_they_are_cut(sizes: list[int], cuts: list[int], loop: str) -> None:
    bodies = [body(size) for size in sizes]
    assert run(lines(bodies, cuts), loop) == [line(own) for own in bodies]


@pytest.mark.parametrize("loop", LOOPS)
def test_bodies_over_tls(loop: str, certificate: Path) -> None:
    bodies = [body(size) for size in (1_000_000, 10, 400_000, 400_000)]
    assert run(lines(bodies, [1000, 300_000], certificate), loop) == [line(own) for own in bodies]


@asynccontextmanager
async def half_read() -> AsyncIterator[asyncio.StreamReader]:
    """A client that has sent half of a body, which is being read."""
    async with asyncio.timeout(60):
        async with connected() as (reader, writer):
            writer.write(request(body(1_000_000))[:500_000])
            await writer.drain()
            while not READING:
                await asyncio.sleep(0.001)
            yield reader
        while READING:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_leaves_ends_its_request(loop: str) -> None:
    async def test() -> None:
        async with half_read():
            pass

    run(test(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_request_that_is_given_up_closes_its_connection(loop: str) -> None:
    async def test() -> None:
        async with half_read() as reader:
            READING[0].cancel()
            assert b"HTTP/1.1 200" not in await reader.read()

    run(test(), loop)
