"""Connections that are slow, silent or too many: each has its time, and health is answered beside them."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from tests.helpers.server.processes import COMMAND, ROOT
from tpeft_deploy import Bundle
from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.certificates import Certificates
from tpeft_deploy.runtime.server.rest.transport.connection import Connection
from tpeft_deploy.runtime.server.rest.transport.listener import HttpServer
from tpeft_deploy.runtime.server.rest.transport.seats import SPARE, Patience, Seat, Seats
from tpeft_deploy.runtime.server.tenancy.intake import Concurrency

HEAD = b"POST /x HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
KIB = 1024


class Transport(asyncio.Transport):
    """What a connection writes to; it keeps `unread` bytes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.unread = 0
        self.ended = ""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return self.unread

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Talk:
    """A connection, and a clock for it."""

    def __init__(self, seats: Seats | None = None, seat: Seat | None = None, *, read: bool = True) -> None:
        self.seats = Seats(Patience()) if seats is None else seats
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        self.read = read
        config = uvicorn.Config(
            self.app, interface="asgi3", proxy_headers=False, ws="none", lifespan="off", log_config=None
        )
        loop = asyncio.get_running_loop()
        self.connection = Connection(
            self.seats,
            seat or self.seats.arrive("192.0.2.1"),
            config=config,
            server_state=ServerState(),
            app_state={},
            _loop=loop,
        )
        self.transport = Transport()
        self.connection.connection_made(self.transport)
        self.now = 0.0

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.set()
        while self.read and (await receive()).get("more_body"):
            pass
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def come(self, data: bytes) -> None:
        self.connection.data_received(data)

    async def answered(self) -> None:
        self.answer.set()
        while b"ok" not in self.transport.written:
            await asyncio.sleep(0)
        self.transport.written = b""
        self.answer.clear()

    def wait(self, seconds: float) -> str:
        """How the connection ended after so long, looked at each second."""
        until = self.now + seconds
        self.connection.look(self.now)
        while self.now < until and not self.transport.ended:
            self.now += 1
            self.connection.look(self.now)
        return self.transport.ended

    @property
    def status(self) -> bytes:
        return self.transport.written[9:12]


def test_a_head_has_its_time_however_it_comes() -> None:
    async def test() -> None:
        silent = Talk()
        assert not silent.wait(9)
        assert silent.wait(2) == "closed"
        assert not silent.transport.written
        dripping = Talk()
        for byte in HEAD[:9]:
            dripping.come(bytes([byte]))
            assert not dripping.wait(1)
        assert dripping.wait(3) == "closed"
        assert dripping.status == b"408"
        second = Talk()
        second.come(GET)
        await second.answered()
        second.come(b"GET ")
        assert not second.wait(9)
        assert second.wait(2) == "closed"
        empty = Talk()
        empty.come(GET)
        await empty.answered()
        for _ in range(9):
            empty.come(b"\r\n")
            assert not empty.wait(1)
        assert empty.wait(3) == "closed"

    asyncio.run(test())


def test_a_body_goes_on_as_long_as_it_comes() -> None:
    async def test() -> None:
        slow = Talk()
        slow.come(HEAD + b"Content-Length: 10000000\r\n\r\n")
        for _ in range(40):
            slow.come(bytes(20 * KIB))
            await asyncio.sleep(0)
            assert not slow.wait(2)
        for _ in range(20):
            slow.come(bytes(KIB))
            await asyncio.sleep(0)
            slow.wait(1)
        assert slow.transport.ended == "closed"
        assert slow.status == b"408"

    asyncio.run(test())


def test_nobody_is_cut_for_what_the_server_takes() -> None:
    async def test() -> None:
        waits = Talk()
        waits.come(GET)
        assert not waits.wait(1000)
        unread = Talk(read=False)
        unread.come(HEAD + b"Content-Length: 10000000\r\n\r\n" + bytes(100 * KIB))
        assert not unread.wait(1000)
        polite = Talk(read=False)
        polite.come(HEAD + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        assert not polite.wait(1000)
        piped = Talk()
        piped.come(GET + GET + GET)
        assert not piped.wait(1000)
        await piped.answered()
        await asyncio.sleep(0)
        assert not piped.wait(1000)

    asyncio.run(test())


def test_idle_connections_and_refused_bodies_end() -> None:
    async def test() -> None:
        idle = Talk()
        for _ in range(3):
            idle.come(GET)
            await idle.answered()
            assert list(idle.seats.waiting) == [idle.connection._seat]
            assert not idle.wait(19)
        assert idle.wait(2) == "closed"
        refused = Talk(read=False)
        refused.come(HEAD + b"Content-Length: 10000000\r\n\r\n")
        await refused.answered()
        assert not refused.seats.waiting
        for _ in range(30):
            refused.come(bytes(100 * KIB))
            refused.wait(1)
        assert refused.transport.ended == "closed"
        late = Talk(read=False)
        late.come(HEAD + b"Content-Length: 10\r\n\r\n")
        await late.answered()
        late.come(bytes(10))
        assert late.seats.waiting
        late.come(GET)
        assert not late.seats.waiting

    asyncio.run(test())


def test_an_answer_goes_on_as_long_as_it_is_read() -> None:
    async def test() -> None:
        reader = Talk()
        reader.come(GET)
        reader.transport.unread = 3000 * KIB
        for _ in range(30):
            reader.transport.unread -= 20 * KIB
            assert not reader.wait(2)
        for _ in range(30):  # one that takes all of each piece, and gets the next
            reader.connection.resume_writing()
            assert not reader.wait(9)
        for _ in range(20):
            reader.transport.unread -= KIB
            reader.wait(1)
        assert reader.transport.ended == "aborted"
        closed = Talk()
        closed.come(b"GET /x HTTP/1.0\r\n\r\n")
        closed.transport.unread = 10
        await closed.answered()
        assert closed.transport.ended == "closed"
        closed.connection.look(0)
        closed.connection.look(10)
        assert closed.transport.ended == "aborted"

    asyncio.run(test())


def test_beyond_the_limit_the_longest_idle_goes_and_then_only_health_is_answered() -> None:
    async def test() -> None:
        seats = Seats(Patience(connections=3, per_address=0))
        talks = [Talk(seats) for _ in range(3)]
        for talk in talks:
            talk.come(GET)
        await talks[1].answered()
        await talks[0].answered()
        newcomer = Talk(seats)
        assert [talk.transport.ended for talk in talks] == ["", "aborted", ""]
        newcomer.come(GET)
        assert not Talk(seats).connection._seat.spare
        assert talks[0].transport.ended == "aborted"
        last = next(iter(seats.waiting))
        seats.waiting.clear()
        spare = Talk(seats)
        assert (spare.connection._seat.spare, len(seats)) == (True, 3)
        spare.come(GET)
        assert (spare.status, spare.transport.ended) == (b"503", "closed")
        assert b"connection: close" in spare.transport.written
        health = Talk(seats)
        health.come(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        await health.asked.wait()
        health.answer.set()
        while not health.transport.ended:
            await asyncio.sleep(0)
        assert (health.status, health.transport.ended) == (b"200", "closed")
        for talk in (spare, health):
            talk.connection.connection_lost(None)
        silent = [Talk(seats) for _ in range(SPARE + 1)]
        assert [talk.transport.ended for talk in silent] == ["aborted"] + [""] * SPARE
        assert silent[1].wait(3) == "closed"
        seats.leave(last)
        seats.leave(last)
        assert len(seats) == 2

    asyncio.run(test())


def test_refused_bodies_are_read_slowly_and_go_first() -> None:
    async def test() -> None:
        seats = Seats(Patience(connections=2, per_address=0))
        refused, idle = Talk(seats, read=False), Talk(seats)
        idle.come(GET)
        await idle.answered()
        refused.come(HEAD + b"Content-Length: 10000000\r\n\r\n")
        await refused.answered()
        refused.come(bytes(100 * KIB))
        assert not refused.connection.flow.read_paused  # the first piece costs nobody anything
        refused.come(bytes(100 * KIB))
        assert refused.connection.flow.read_paused
        Talk(seats)
        assert (refused.transport.ended, idle.transport.ended) == ("aborted", "")
        assert not seats.refused

    asyncio.run(test())


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=50))
def test_refused_bodies_together_take_their_time(sizes: list[int]) -> None:
    seats, now = Seats(Patience()), 100.0
    waits = [seats.drain(size, now) for size in sizes]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(sum(sizes[:-1]) / (64 << 20))
    assert seats.drain(1, now + 1000) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["arrive", "leave", "wait", "work"]), st.integers(0, 30)), max_size=60))
def test_counts_of_seats_hold_whatever_happens(steps: list[tuple[str, int]]) -> None:
    seats = Seats(Patience(connections=6, per_address=3))
    hosts = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "::ffff:192.0.2.1", "2001:db8:0:1::1%eth0"]
    networks = ["192.0.2.1", "192.0.2.2", "2001:db8::", "2001:db8::", "192.0.2.1", "2001:db8:0:1::"]
    open_: list[Seat] = []
    for what, number in steps:
        if what == "arrive":
            seat = seats.arrive(hosts[number % 6])
            assert seat.address == networks[number % 6]
            seat.end = partial(open_.remove, seat)
            open_.append(seat)
        elif open_ and what == "leave":
            seats.leave(open_.pop(number % len(open_)))
        elif open_:
            seat = open_[number % len(open_)]
            if what == "work" or seat.spare:
                seats.waiting.pop(seat, None)
            else:
                seats.waiting[seat] = None
        taken = [seat for seat in open_ if not seat.spare]
        assert len(seats) == len(taken) <= 6
        assert len(open_) - len(taken) <= SPARE
        assert max([0, *(sum(one.address == own.address for one in taken) for own in taken)]) <= 3
    for seat in open_:
        seats.leave(seat)
    assert (len(seats), seats.waiting, seats._of, seats._spare) == (0, {}, {}, {})


def test_a_key_has_so_many_at_once() -> None:
    own = Concurrency(2)
    for key in "aab":
        own.enter(key)
    with pytest.raises(QuotaExceeded, match="2 requests of a key") as caught:
        own.enter("a")
    assert caught.value.retry_after == 1
    for key in "aab":
        own.leave(key)
    assert own.used_by("a") == own.used_by("b") == 0


@contextmanager
def few_files(bundle: Bundle, place: Path, files: int, *more: object) -> Iterator[str]:
    """Where a server listens that may have so many open files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    line = [*COMMAND, "serve", bundle.path, "--state", place / "state", "--port", 0, "--threads", 1, "--no-auth", *more]
    process = subprocess.Popen(
        list(map(str, line)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,  # noqa: PLW1509
    )
    assert process.stderr is not None
    try:
        url = next((line.split()[-1] for line in process.stderr if line.startswith("serving on ")), None)
        assert url is not None
        yield url
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of open files")
def test_health_is_answered_beside_silent_sockets_where_files_are_few(
    conv_bundle: Bundle, tmp_path: Path, certificate: Path
) -> None:
    tls = ["--tls-cert", certificate / "cert.pem", "--tls-key", certificate / "key.pem"]
    for name, flags in (("plain", []), ("tls", tls)):
        with few_files(conv_bundle, tmp_path / name, 64, *flags) as url, ExitStack() as stack:
            address = (httpx.URL(url).host, httpx.URL(url).port)
            for _ in range(100):
                silent = stack.enter_context(socket.create_connection(address, timeout=100))
                if name == "plain":
                    silent.sendall(b"GET /v2 HTTP/1.1\r\nHos")  # cannot be asked to go
            for _ in range(10):
                assert httpx.get(f"{url}/v2/health/ready", timeout=100, verify=False).status_code == 200


def test_a_handshake_has_its_time_and_its_seat_is_given_back(certificate: Path) -> None:
    async def test() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("nothing was asked")

        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
        server = HttpServer(config, Patience(head_seconds=0.05))
        server.tls = Certificates(certificate / "cert.pem", certificate / "key.pem").context
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve([listener]))
            silent = await asyncio.open_connection(*listener.getsockname())
            spoilt = await asyncio.open_connection(*listener.getsockname())
            spoilt[1].write(b"GET / HTTP/1.1\r\n\r\n")
            for reader, writer in (silent, spoilt):
                with suppress(ConnectionResetError):
                    assert b"HTTP" not in await asyncio.wait_for(reader.read(), 100)
                writer.close()
            while len(server.seats):
                await asyncio.sleep(0.01)
            server.should_exit = True
            await serving

    asyncio.run(test())
