"""Inference endpoint over HTTP, as a plain ASGI application to keep the hot path short."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.infer_codec import (
    ADAPTER_HEADERS,
    HEADER,
    Framed,
    decode,
    encode_parts,
    is_heavy,
    json_bytes,
)
from tpeft_deploy.runtime.server.rest.infer_json import InferenceHeaderCache
from tpeft_deploy.runtime.server.rest.json_data import SMALL
from tpeft_deploy.runtime.server.rest.responses import GONE, HttpRecord, told
from tpeft_deploy.runtime.server.rest.transport.compression import compress, decompress, encoding_for, is_compressed
from tpeft_deploy.runtime.server.rest.transport.disconnects import ClientLeft, Watch
from tpeft_deploy.runtime.server.tenancy.byte_budget import Hold
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.messages import InferResponse
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["InferenceEndpoint", "Receive", "Scope", "Send", "model_of"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_ARRAYS = 5  # bytes of arrays and scratch per byte of JSON: a digit and a comma become eight
_TEXT = 6  # bytes of JSON per byte of an output
_DIGITS = 19


def model_of(path: str) -> tuple[str, str] | None:
    """Return the model and version of `/v2/models/MODEL[/versions/VERSION]/infer`; None for other paths."""
    parts = path.split("/")
    if len(parts) == 5 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "infer":
        return parts[3], ""
    if len(parts) == 7 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "versions" and parts[6] == "infer":
        return parts[3], parts[5]
    return None


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

    async def __call__(self, model: str, version: str, record: HttpRecord, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            record.caller = principal = self._core.authenticate(record.authorization)
            record.task = model
            self._core.admit(principal)
            hold = self._intake.memory.hold(principal.tenant)
            self._intake.requests.enter(principal.key)
            try:
                framed = await self._framed(model, version, record, receive, hold)
                response = await self._watch.cancel_on_disconnect(self._core.infer(principal, framed.request), receive)
                size = sum([array.nbytes for array in response.outputs.values()])
                hold.take(size)
                parts: Sequence[bytes]
                if size <= SMALL and b"accept-encoding" not in record.headers:
                    own, parts = encode_parts(response, framed)
                else:
                    own, parts = await self._encoded(response, size, framed, record.headers, hold)
                del framed, response
                await record.send(send, 200, own, parts)
                return
            finally:
                hold.close()
                self._intake.requests.leave(principal.key)
        except ClientLeft:
            record.status = GONE
            return
        except Exception as error:
            refusal = told(error, record)
            if record.caller is not None and record.bytes_in > PIECE:
                self._intake.refused.charge(record.caller.tenant, record.bytes_in)
        # Sent outside the except block, so that the error and the body that it references are freed first.
        await record.send(send, *refusal)

    async def _framed(self, model: str, version: str, record: HttpRecord, receive: Receive, hold: Hold) -> Framed:
        """Read and decode the body; its memory is reserved in `hold`."""
        headers = record.headers
        given = headers.get(b"content-length", b"")
        declared = 0 if not given.isdigit() else int(given) if len(given) < _DIGITS else sys.maxsize
        limit = self._limit(headers, declared)
        if declared > PIECE or not given:
            seconds = self._intake.refused.wait(hold.tenant)
            if seconds:
                await asyncio.sleep(seconds)
        hold.take(declared)
        message = await receive()
        body = message.get("body", b"")
        if message.get("more_body", True) or len(body) > declared:  # most bodies are one message of the declared size
            body = await _read_body(message, receive, limit, record, hold)
        record.bytes_in = len(body)
        if is_compressed(headers):
            body = await decompress(headers, body, limit, hold, self._intake.offload)
        if not is_heavy(headers, body):
            return decode(model, version, headers, body, self._heads, _adapter(headers))
        read = len(body)
        hold.take(_ARRAYS * read)
        adapter = _adapter(headers)
        # The shared cache is not thread-safe; it belongs to the event loop.
        heads = InferenceHeaderCache(self._limits)
        framed = await self._intake.offload.run(hold.tenant, decode, model, version, headers, body, heads, adapter)
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
        self, response: InferResponse, size: int, framed: Framed, headers: Mapping[bytes, bytes], hold: Hold
    ) -> tuple[list[tuple[bytes, bytes]], Sequence[bytes]]:
        """Encode a response to headers and body parts; `hold` already covers its arrays."""
        json = json_bytes(response, framed.head) if size > SMALL else 0
        run = self._intake.offload.run
        if json > SMALL:
            hold.take(_TEXT * json)
            own, parts = await run(hold.tenant, encode_parts, response, framed)
        else:
            own, parts = encode_parts(response, framed)
        length = sum(map(len, parts))
        encoding = encoding_for(headers, length)
        if encoding is None:
            return own, parts
        if length <= SMALL:
            body = compress(encoding, parts)
        else:
            hold.take(length)
            body = await run(hold.tenant, compress, encoding, parts)
        return [*own, (b"content-encoding", encoding)], [body]


async def _read_body(
    message: MutableMapping[str, Any], receive: Receive, limit: int, record: HttpRecord, hold: Hold
) -> bytes | bytearray:
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
        record.bytes_in = size
        if size > limit:
            raise _too_large(limit, "more")
        if size > hold.size:
            hold.resize(size)
        more = message.get("more_body", False)
        if size == len(part):
            first = part  # avoids a copy: most bodies are one message
        else:
            body += first + part if first else part
            first = b""
        if not more:
            return body or first
        message = await receive()


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
