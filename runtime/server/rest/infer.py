"""Inference endpoint over HTTP, as a plain ASGI application to keep the hot path short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.context import GONE
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.context import Headers, HttpContext, Receive, Response, Send
from tpeft_deploy.runtime.server.rest.infer_codec import (
    ADAPTER_HEADERS,
    HEADER,
    Framed,
    InferenceHeaderCache,
    decode,
    encode_parts,
    header_length,
    is_heavy,
    json_bytes,
)
from tpeft_deploy.runtime.server.rest.json_data import SMALL
from tpeft_deploy.runtime.server.rest.transport.compression import compress, decompress, encoding_for, is_compressed
from tpeft_deploy.runtime.server.rest.transport.connection import READ_BODY, BodyRead
from tpeft_deploy.runtime.server.tenancy.intake import Hold, Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.messages import InferResponse
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["ClientLeft", "InferenceEndpoint", "Watch"]

T = TypeVar("T")
_ARRAYS = 5  # bytes of arrays and scratch per byte of JSON: a digit and a comma become eight
_TEXT = 6  # bytes of JSON per byte of an output
_DIGITS = 19  # more would not fit a machine word


class InferenceEndpoint:
    """Serve `POST /v2/models/MODEL[/versions/VERSION]/infer`.

    Key, role, request quota, declared sizes and memory budget are checked in this order before the body is read.

    Args:
        core: the server's operations.
        limits: limits of bodies and tensors.
        intake: budgets and threads.
    """

    def __init__(self, core: Service, limits: RestLimits, intake: Intake) -> None:
        self._core = core
        self._limits = limits
        self._intake = intake
        self._heads = InferenceHeaderCache(limits)
        self._watch = Watch()

    async def __call__(self, model: str, version: str, context: HttpContext, send: Send) -> None:
        """Serve one request."""
        try:
            answer: Response
            context.caller = principal = self._core.authenticate(context.authorization)
            context.task = model
            self._core.admit(principal)
            context.enter(self._intake.requests)
            try:
                hold = context.memory
                framed = await self._framed(model, version, context, hold)
                work = self._core.infer(principal, framed.request)
                response = await self._watch.cancel_on_disconnect(work, context.receive)
                size = sum([array.nbytes for array in response.outputs.values()])
                hold.take(size)
                if size <= SMALL and b"accept-encoding" not in context.headers:
                    answer = 200, *encode_parts(response, framed)
                else:
                    answer = 200, *await self._encoded(response, size, framed, context.headers, hold)
                del framed, response
                await context.send(send, *answer)
                return
            finally:
                context.close()
        except ClientLeft:
            context.status = GONE
            return
        except Exception as error:
            answer = context.refusal(error)
            context.charge_refusal()
        # Sent outside the except block, so that the error and the body that it references are freed first.
        await context.send(send, *answer)

    async def _framed(self, model: str, version: str, context: HttpContext, hold: Hold) -> Framed:
        """Read and decode the body, after reserving memory for it."""
        headers, declared = context.headers, context.declared
        limit = self._limit(headers, declared)
        if declared > PIECE or b"content-length" not in headers:
            seconds = self._intake.refused.wait(hold.tenant)
            if seconds:
                await asyncio.sleep(seconds)
        hold.take(declared)
        message = await context.receive()
        body: bytes | bytearray | memoryview = message.get("body", b"")
        read_rest = _reader(message, context)
        if read_rest is not None:
            body = await _read_raw(read_rest, message["body"], context)
        elif message.get("more_body", True) or len(body) > declared:  # most bodies are one message of the declared size
            body = await _read_body(message, limit, context)
        context.bytes_in = len(body)
        if b"content-encoding" in headers and not isinstance(body, memoryview):
            body = await decompress(headers, body, limit, hold, self._intake.offload)
        adapter = _adapter(headers)
        if not is_heavy(headers, body):
            return decode(model, version, headers, body, self._heads, adapter, context.traceparent)
        read = len(body)
        hold.take(_ARRAYS * read)
        # The shared cache is not thread-safe; it belongs to the event loop.
        heads = InferenceHeaderCache(self._limits)
        framed = await self._intake.offload.run(
            hold.tenant, decode, model, version, headers, body, heads, adapter, context.traceparent
        )
        hold.resize(read + sum(array.nbytes for array in framed.request.inputs.values()))
        return framed

    def _limit(self, headers: Mapping[bytes, bytes], declared: int) -> int:
        """Return the maximum body size; raise TooLarge if the declared size exceeds it."""
        own = self._limits
        given = headers.get(HEADER)
        limit = own.body_bytes if given is not None else min(own.json_bytes, own.body_bytes)
        json = int(given) if given is not None and given.isdigit() and len(given) < _DIGITS else 0
        if declared > limit:
            raise _too_large(limit, f"{declared:,}")
        if own.json_bytes < json <= (declared or json) and not is_compressed(headers):
            raise _too_large(own.json_bytes, f"{json:,} of JSON")
        return limit

    async def _encoded(
        self, response: InferResponse, size: int, framed: Framed, asked: Mapping[bytes, bytes], hold: Hold
    ) -> tuple[Headers, Sequence[bytes]]:
        """Encode a response to headers and body parts; `hold` already covers its arrays."""
        json = json_bytes(response, framed.head) if size > SMALL else 0
        run = self._intake.offload.run
        if json > SMALL:
            hold.take(_TEXT * json)
            headers, parts = await run(hold.tenant, encode_parts, response, framed)
        else:
            headers, parts = encode_parts(response, framed)
        length = sum(map(len, parts))
        encoding = encoding_for(asked, length)
        if encoding is None:
            return headers, parts
        if length <= SMALL:
            body = compress(encoding, parts)
        else:
            hold.take(length)
            body = await run(hold.tenant, compress, encoding, parts)
        return [*headers, (b"content-encoding", encoding)], [body]


def _reader(message: Mapping[str, Any], context: HttpContext) -> BodyRead | None:
    """Return what reads the rest of raw tensors without copies, if that is large and its size was declared."""
    headers = context.headers
    if not message.get("more_body", False) or HEADER not in headers or b"content-encoding" in headers:
        return None
    left = context.declared - len(message["body"])
    read: BodyRead | None = context.scope.get("extensions", {}).get(READ_BODY)
    return read if left > PIECE else None


async def _read_raw(read: BodyRead, first: bytes, context: HttpContext) -> bytes | memoryview:
    """Read the rest of a body of the declared size, for which memory is reserved."""
    body = await read(first, context.declared, header_length(context.headers, context.declared))
    context.bytes_in = len(body)
    if len(body) < context.declared:
        raise ClientLeft
    return body


async def _read_body(message: MutableMapping[str, Any], limit: int, context: HttpContext) -> bytes | bytearray:
    """Read the rest of a body; memory is reserved as it arrives.

    Raises:
        TooLarge: the body is larger than `limit` bytes; the excess is discarded.
        QuotaExceeded, Unavailable: the memory budget is used up.
    """
    first = b""
    body = bytearray()
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        context.bytes_in = size
        if size > limit:
            raise _too_large(limit, "more")
        if size > context.memory.size:
            context.memory.resize(size)
        more = message.get("more_body", False)
        if size == len(part):
            first = part  # avoids a copy: most bodies are one message
        else:
            body += first + part if first else part
            first = b""
        if not more:
            return body or first
        message = await context.receive()


def _too_large(limit: int, got: str) -> TooLarge:
    """Return the error for a body of more than `limit` bytes."""
    fix = "Large tensors go as raw bytes behind the JSON, with binary_data_size."
    return TooLarge("read a body", expected=f"at most {limit:,} bytes", got=got, fix=fix)


def _adapter(headers: Mapping[bytes, bytes]) -> str | None:
    if ADAPTER_HEADERS.isdisjoint(headers):
        return None
    found = {headers[name] for name in ADAPTER_HEADERS if name in headers}
    if len(found) > 1:
        names = ", ".join(quoted(name.decode("latin-1")) for name in sorted(found))
        raise ProtocolError("adapter", expected="one task for the whole batch", got=f"{names} in headers")
    return found.pop().decode("latin-1")


class ClientLeft(Exception):
    """The client disconnected."""


class _Waiting:
    """A pending request; `watching` is set once its connection is watched."""

    __slots__ = ("is_old", "left", "receive", "task", "watching")

    def __init__(self, task: asyncio.Task[Any], receive: Receive) -> None:
        self.task = task
        self.receive = receive
        self.is_old = False
        self.left = False
        self.watching: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.task.cancel()


class Watch:
    """Cancellation of in-flight requests of one event loop on disconnect of their client.

    Watching a connection takes a task, which costs as much as a fast response; so only requests that have been pending
    for a while are watched.

    Args:
        patience: seconds; a request is watched after it has been pending for one to two times as long.
    """

    def __init__(self, patience: float = 0.02) -> None:
        self._patience = patience
        self._waiting: set[_Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def cancel_on_disconnect(self, work: Awaitable[T], receive: Receive) -> T:
        """Await `work`, and cancel it when the client disconnects.

        Raises:
            ClientLeft: the client disconnected.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("expected to be called from a task")
        own = _Waiting(task, receive)
        self._waiting.add(own)
        if self._timer is None:
            self._timer = loop.call_later(self._patience, self._look)
        try:
            return await work
        except asyncio.CancelledError:
            if own.left and task.uncancel() == 0:
                raise ClientLeft from None
            raise
        finally:
            self._waiting.discard(own)
            if own.watching is not None:
                own.watching.cancel()

    def _look(self) -> None:
        self._timer = None
        for own in self._waiting:
            if not own.is_old:
                own.is_old = True
            elif own.watching is None:
                own.watching = asyncio.get_running_loop().create_task(own.watch())
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._look)
