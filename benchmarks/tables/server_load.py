"""A client that keeps a number of connections busy, and notes how long each answer took."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from benchmarks.tables.server_process import Failed

__all__ = ["Load", "Request", "ask", "load"]

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


@dataclass(frozen=True)
class Request:
    """A POST of JSON."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        headers = {"Host": "127.0.0.1", "Content-Type": "application/json", **self.headers}
        lines = [f"POST {self.path} HTTP/1.1", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + self.body


@dataclass(frozen=True)
class Load:
    """What a turn found.

    Args:
        latencies: seconds of each answer.
        seconds: length of the turn.
        busy: share of the turn in which the client had its processor.
    """

    latencies: Sequence[float]
    seconds: float
    busy: float


def _chunks(body: bytes) -> bytes | None:
    """The content of a chunked body; None while it is not whole."""
    found = b""
    while True:
        size, end, body = body.partition(b"\r\n")
        if not end:
            return None
        length = int(size, 16)
        if len(body) < length + 2:
            return None
        if not length:
            return found
        found, body = found + body[:length], body[length + 2 :]


class _Connection(asyncio.Protocol):
    """One request at a time; the next as soon as an answer is whole."""

    def __init__(self, requests: Sequence[bytes], turn: int, until: float, latencies: list[float]) -> None:
        self.requests, self.turn, self.until, self.latencies = requests, turn, until, latencies
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.held = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(self.requests[self.turn % len(self.requests)])
        self.turn += 1

    def data_received(self, data: bytes) -> None:
        self.held += data
        head, end, body = self.held.partition(b"\r\n\r\n")
        if not end:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(f"expected an answer with status 200, got {self.held[:300]!r}")
            return
        length = _LENGTH.search(head + b"\r\n")
        whole = _chunks(body) if length is None else body if len(body) >= int(length[1]) else None
        if whole is None:
            return
        now = time.perf_counter()
        self.latencies.append(now - self.began)
        self.held = b""
        if now < self.until:
            self._send()
        elif not self.done.done():
            self.done.set_result(whole)
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection was closed: {error}")

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(Failed(why))


async def _connections(port: int, requests: Sequence[bytes], count: int, seconds: float) -> tuple[list[float], bytes]:
    latencies: list[float] = []
    loop, until = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = [
        loop.create_connection(partial(_Connection, requests, turn, until, latencies), "127.0.0.1", port)
        for turn in range(count)
    ]
    opened = await asyncio.gather(*made)
    *_, last = await asyncio.gather(*(protocol.done for _, protocol in opened))
    return latencies, last


def _run(port: int, requests: Sequence[Request], count: int, seconds: float) -> tuple[list[float], bytes]:
    factory = import_module("uvloop").new_event_loop if find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_connections(port, [request.encoded() for request in requests], count, seconds))


def ask(port: int, request: Request) -> bytes:
    """One answer's body.

    Raises:
        Failed: the server refused.
    """
    return _run(port, [request], 1, 0.0)[1]


def load(port: int, requests: Sequence[Request], connections: int, seconds: float) -> Load:
    """Answers to requests in turn, on so many connections, from the last core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        began, spent = time.perf_counter(), time.process_time()
        latencies, _ = _run(port, requests, connections, seconds)
        took = time.perf_counter() - began
        return Load(latencies, took, (time.process_time() - spent) / took)
    finally:
        os.sched_setaffinity(0, cores)
