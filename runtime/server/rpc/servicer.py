"""gRPC servicer: authentication, limits, errors and request records."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from tpeft_deploy.errors import ProtocolError, QuotaExceeded, ServerError, Unauthenticated, Unsupported
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.field_limit import parse, split_raw
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE, Call, Method
from tpeft_deploy.runtime.server.rpc.reading import read_message
from tpeft_deploy.runtime.server.telemetry.request_record import TRACEPARENT, RequestRecord, request_id
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.byte_budget import Hold
from tpeft_deploy.runtime.server.tenancy.concurrency import Concurrency
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.server.v2.statuses import Status, status_of
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["Observer", "RpcRecord", "Servicer"]

T = TypeVar("T")
Observer = Callable[[RequestRecord], None]
_LOG = logging.getLogger(__name__)
_GONE = 499
_ELEMENT = 16  # bytes of memory per typed element, parsed and as an array
_TEXT_BYTES = 1000  # clients accept 8 KiB of trailers, and percent-encoding triples a byte


class RpcRecord(RequestRecord):
    """Request record of a gRPC call.

    Args:
        method: name of the rpc.
        route: full name of the rpc.
        metadata: metadata of the call.
        caller: principal, if it is known already.
        size: size of the message.
    """

    __slots__ = ("_id", "_metadata", "_own")

    def __init__(
        self, method: str, route: str, metadata: Mapping[str, str], caller: Principal | None = None, size: int = 0
    ) -> None:
        super().__init__("grpc", method)
        self.route = route
        self.status = 200
        self.caller = caller
        self.bytes_in = size
        self._metadata = metadata
        self._id = ""
        self._own = b""

    def describe(self, request: Any) -> None:
        """Record model and id of a message."""
        self.task = getattr(request, "model_name", "") or getattr(request, "name", "")
        self._id = getattr(request, "id", "")
        self._own = b""

    @property
    def request_id(self) -> str:
        """Request id of the client if it is safe to log; else a generated one."""
        if not self._own:
            self._own = request_id((self._id or self._metadata.get("x-request-id", "")).encode("utf-8", "replace"))
        return self._own.decode("latin-1")

    @property
    def traceparent(self) -> str:
        """W3C trace context of the caller."""
        return self._metadata.get("traceparent", "")[:TRACEPARENT]


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type information
    """Handler of the rpcs of `METHODS`.

    Keys are checked before a message is received; unknown rpcs are reported only to authenticated clients. All
    handlers are stream handlers, because only these control when a message is received; clients see no difference.

    Args:
        core: the server's operations.
        limits: limits of messages.
        observe: called with the record of each request, including each message of a stream; must not block or raise.
        intake: budgets and threads, shared with other protocols.
    """

    def __init__(
        self, core: Service, limits: RpcLimits, observe: Observer | None = None, intake: Intake | None = None
    ) -> None:
        self._core = core
        self._limits = limits
        self._observe = observe
        self._intake = intake or Intake()

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a call."""
        path: str = handler_call_details.method
        name = path.removeprefix(f"/{SERVICE}/")
        method = METHODS.get(name)
        metadata = _texts(handler_call_details.invocation_metadata)
        record = RpcRecord(name, path, metadata) if method else RpcRecord("unknown", "unknown", metadata)
        try:
            record.caller = self._caller(method, handler_call_details.invocation_metadata)
            method = _allowed(path, method, record.caller)
        except Exception as error:
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._refuse, _status(error), record))
        hold = self._intake.memory.hold(record.tenant)
        call = Call(self._core, self._limits, record.caller, metadata, hold, self._intake.offload)
        if method.stream:
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._stream, method, call, record))
        return grpc.stream_stream_rpc_method_handler(functools.partial(self._unary, method, call, record))

    def _caller(self, method: Method | None, metadata: Sequence[tuple[str, str | bytes]]) -> Principal | None:
        if method is not None and method.action is Action.HEALTH:
            return None
        found = [value for key, value in metadata if key == "authorization"]
        if len(found) > 1 or any(isinstance(value, bytes) for value in found):
            raise Unauthenticated("authorization", expected="one text", got=f"{len(found)} values")
        return self._core.authenticate(str(found[0]) if found else None)

    async def _refuse(self, status: Status, record: RpcRecord, _: Any, context: Any) -> None:
        record.status = status.http
        self._tell(record)
        await _abort(context, status)

    async def _unary(self, method: Method, call: Call, record: RpcRecord, _: Any, context: Any) -> None:
        call.timeout = context.time_remaining()
        try:
            with _one(call.caller, self._intake.requests), call.hold:
                answer = await self._answered(method, call, record, context)
                record.bytes_out = len(answer)
                await context.write(answer)
        except asyncio.CancelledError:
            record.status = _GONE
            self._tell(record)
            raise
        except Exception as error:
            status = _status(error)
            self._charge(call.caller, record.bytes_in)
        else:
            self._tell(record)
            return
        finally:
            call.raws = None  # grpc keeps this frame alive until a garbage collection
        # Sent outside the except block, so that the error and the message that it references are freed first.
        await self._refuse(status, record, None, context)

    async def _answered(self, method: Method, call: Call, record: RpcRecord, context: Any) -> bytes:
        if method.action is Action.INFER:
            self._core.admit(call.principal)
        await self._pay(call.caller)
        data = await read_message(context, call.hold, self._limits, self._limits.read_seconds, lent=call.caller is None)
        if data is None:
            raise ProtocolError("request", expected="a message", got="none")
        record.bytes_in = len(data)
        request = await self._parsed(method, call, data)
        del data
        record.describe(request)
        return _bytes_of(await method.answer(call, request))

    async def _stream(self, method: Method, call: Call, record: RpcRecord, _: Any, context: Any) -> None:
        try:
            with _one(call.caller, self._intake.streams):
                status = await self._answer_stream(method, call, record.method, context)
        except QuotaExceeded as error:
            await self._refuse(_status(error), record, None, context)
        else:
            if status is not None:
                await _abort(context, status)

    async def _answer_stream(self, method: Method, call: Call, name: str, context: Any) -> Status | None:
        """Serve a stream; return the status that ends it early."""
        refused: list[Status] = []
        held: set[Hold] = set()  # of in-flight messages

        async def read() -> tuple[bytes, Hold] | None:
            hold = self._intake.memory.hold(call.hold.tenant)
            held.add(hold)
            try:
                await self._pay(call.caller)
                data = await read_message(context, hold, self._limits, None, lent=True)
            except ServerError as error:
                refused.append(_status(error))
                return None
            return None if data is None else (data, hold)

        async def answer(message: tuple[bytes, Hold]) -> bytes:
            data, hold = message
            record = RpcRecord(name, f"/{SERVICE}/{name}", call.metadata, call.caller, len(data))
            one = replace(call, hold=hold, timeout=context.time_remaining(), streamed=True)
            try:
                return await self._one_of_stream(method, one, record, data)
            finally:
                hold.close()
                held.discard(hold)

        try:
            await _in_order(context, read, answer, self._limits.in_flight)
        finally:
            for hold in held:
                hold.close()
        return refused.pop() if refused else None

    async def _one_of_stream(self, method: Method, call: Call, record: RpcRecord, data: bytes) -> bytes:
        request = None
        try:
            # Authenticated per message: a key may be revoked while the stream is open.
            call.caller = record.caller = self._core.authenticate(call.metadata.get("authorization"))
            allow(call.caller, method.action)
            self._core.admit(call.caller)
            with _one(call.caller, self._intake.requests):
                request = await self._parsed(method, call, data)
                record.describe(request)
                answer = _bytes_of(await method.answer(call, request))
        except asyncio.CancelledError:
            record.status = _GONE
            self._tell(record)
            raise
        except Exception as error:
            status = _status(error)
            self._charge(call.caller, len(data))
            record.status = status.http
            asked = {} if request is None else {"id": request.id, "model_name": request.model_name}
            message = pb.ModelStreamInferResponse(error_message=_clipped(status.text), infer_response=asked)
            answer = _bytes_of(message)
        record.bytes_out = len(answer)
        self._tell(record)
        return answer

    def _charge(self, caller: Principal | None, size: int) -> None:
        """Delay the tenant's next message after a large refused one."""
        if caller is not None and size > PIECE:
            self._intake.refused.charge(caller.tenant, size)

    async def _pay(self, caller: Principal | None) -> None:
        seconds = 0.0 if caller is None else self._intake.refused.wait(caller.tenant)
        if seconds:
            await asyncio.sleep(seconds)

    async def _parsed(self, method: Method, call: Call, data: bytes) -> Any:
        """Parse a message; raw tensors of a large one go to `call.raws`, long work runs in other threads."""
        if len(data) <= PIECE:
            return parse(method.request, data, self._limits)
        if method.request is pb.ModelInferRequest:
            data, call.raws = split_raw(data, self._limits)
            if len(data) <= PIECE:
                return parse(method.request, data, self._limits)
        call.heavy = True
        call.hold.take(len(data) + _ELEMENT * min(len(data), self._limits.typed_elements))
        return await call.offload.run(call.hold.tenant, parse, method.request, data, self._limits)

    def _tell(self, record: RpcRecord) -> None:
        if self._observe is not None:
            record.end()
            self._observe(record)


async def _in_order(
    context: Any, read: Callable[[], Awaitable[T | None]], answer: Callable[[T], Awaitable[bytes]], in_flight: int
) -> None:
    """Serve the messages of a stream concurrently, responding in order; an error cancels in-flight messages.

    Args:
        context: gRPC context of the call.
        read: returns the next message; None at the end.
        answer: returns the response to one message; an exception ends the stream.
        in_flight: maximum number of in-flight messages; the client waits beyond it.
    """
    room = asyncio.Semaphore(in_flight)
    waiting: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:

        async def one(data: T) -> bytes:
            return await answer(data)

        async def read_all() -> None:
            await room.acquire()
            while (data := await read()) is not None:
                waiting.put_nowait(group.create_task(one(data)))
                del data
                await room.acquire()
            waiting.put_nowait(None)

        group.create_task(read_all())
        while (task := await waiting.get()) is not None:
            await context.write(await task)
            room.release()


def _allowed(path: str, method: Method | None, caller: Principal | None) -> Method:
    if method is None:
        raise Unsupported(f"rpc {quoted(path)}", problem="this server has no such rpc")
    if caller is not None:
        allow(caller, method.action)
    return method


def _one(caller: Principal | None, among: Concurrency) -> AbstractContextManager[None]:
    return nullcontext() if caller is None else among.one(caller.key)


def _texts(metadata: Sequence[tuple[str, str | bytes]]) -> Mapping[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}


def _status(error: Exception) -> Status:
    status = status_of(error)
    if status.http == 500:
        _LOG.error("a call over gRPC failed", exc_info=error)
    return status


async def _abort(context: Any, status: Status) -> None:
    trailers = () if status.retry_after is None else (("retry-after", str(status.retry_after)),)
    await context.abort(grpc.StatusCode[status.grpc], _clipped(status.text), trailers)


def _bytes_of(answer: Message | bytes) -> bytes:
    if isinstance(answer, bytes):
        return answer
    data: bytes = answer.SerializeToString()
    return data


def _clipped(text: str) -> str:
    data = text.encode()
    return text if len(data) <= _TEXT_BYTES else data[:_TEXT_BYTES].decode(errors="ignore") + "..."
