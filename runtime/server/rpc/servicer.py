"""gRPC servicer: authentication, limits, errors and request contexts."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from tpeft_deploy.errors import ProtocolError, QuotaExceeded, ServerError, Unauthenticated, Unsupported
from tpeft_deploy.runtime.server.context import GONE, RequestContext
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.context import RpcContext
from tpeft_deploy.runtime.server.rpc.field_limit import parse, split_raw
from tpeft_deploy.runtime.server.rpc.generation import generated, generates
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE, Method
from tpeft_deploy.runtime.server.rpc.reading import read_message
from tpeft_deploy.runtime.server.rpc.sending import ClientGone, abort, clipped, send
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.intake import Hold, Intake
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.server.v2.statuses import Status, status_of
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["Observer", "Servicer"]

T = TypeVar("T")
Observer = Callable[[RequestContext], None]
Write = Callable[[bytes], Awaitable[None]]
Several = Callable[[], Write]
"""Lets the messages behind one go first; returns what sends the answers of that one."""
_LOG = logging.getLogger(__name__)
_ELEMENT = 16  # bytes of memory per typed element, parsed and as an array


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type information
    """Handler of the rpcs of `METHODS`.

    Keys are checked before a message is received; unknown rpcs are reported only to authenticated clients. All
    handlers are stream handlers, because only these control when a message is received; clients see no difference.

    Args:
        core: the server's operations.
        limits: limits of messages.
        observe: called with the context of each request, including each message of a stream; must not block or raise.
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
        given = handler_call_details.invocation_metadata
        metadata = {key: value for key, value in given if isinstance(value, str)}
        names = (name, path) if method else ("unknown", "unknown")
        call = RpcContext(self._core, self._limits, self._intake, *names, metadata)
        try:
            call.caller = self._caller(method, given)
            method = _allowed(path, method, call.caller)
        except Exception as error:
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._refuse, _status(error), call))
        serve = self._stream if method.stream else self._unary
        return grpc.stream_stream_rpc_method_handler(functools.partial(serve, method, call))

    def _caller(self, method: Method | None, metadata: Sequence[tuple[str, str | bytes]]) -> Principal | None:
        if method is not None and method.action is Action.HEALTH:
            return None
        found = [value for key, value in metadata if key == "authorization"]
        if len(found) > 1 or any(isinstance(value, bytes) for value in found):
            raise Unauthenticated("authorization", expected="one text", got=f"{len(found)} values")
        return self._core.authenticate(str(found[0]) if found else None)

    async def _refuse(self, status: Status, call: RpcContext, _: Any, context: Any) -> None:
        call.status = status.http
        self._end(call)
        await abort(context, status)

    async def _unary(self, method: Method, call: RpcContext, _: Any, context: Any) -> None:
        call.deadline = context.time_remaining()
        try:
            with call.enter(self._intake.requests):
                answer = await self._answered(method, call, context)
                call.bytes_out = len(answer)
                await send(context, answer)
        except ClientGone:
            call.status = GONE
            self._end(call)
            return
        except asyncio.CancelledError:
            call.status = GONE
            self._end(call)
            raise
        except Exception as error:
            status = _status(error)
            call.charge_refusal()
        else:
            self._end(call)
            return
        finally:
            call.raws = None  # grpc keeps this frame alive until a garbage collection
        # Sent outside the except block, so that the error and the message that it references are freed first.
        await self._refuse(status, call, None, context)

    async def _answered(self, method: Method, call: RpcContext, context: Any) -> bytes:
        if method.action is Action.INFER:
            self._core.admit(call.principal)
        await self._wait(call)
        lent = call.caller is None
        data = await read_message(context, call.memory, self._limits, self._limits.read_seconds, lent=lent)
        if data is None:
            raise ProtocolError("request", expected="a message", got="none")
        call.bytes_in = len(data)
        request = await self._parsed(method, call, data)
        del data
        call.describe(request)
        return _bytes_of(await method.answer(call, request))

    async def _stream(self, method: Method, call: RpcContext, _: Any, context: Any) -> None:
        try:
            with call.enter(self._intake.streams):
                status = await self._answer_stream(method, call, context)
        except QuotaExceeded as error:
            await self._refuse(_status(error), call, None, context)
        else:
            if status is not None:
                await abort(context, status)

    async def _answer_stream(self, method: Method, call: RpcContext, context: Any) -> Status | None:
        """Serve a stream; return the status that ends it early."""
        refused: list[Status] = []
        held: set[Hold] = set()  # of in-flight messages

        async def read() -> tuple[bytes, Hold] | None:
            hold = self._intake.memory.hold(call.tenant)
            held.add(hold)
            try:
                await self._wait(call)
                data = await read_message(context, hold, self._limits, None, lent=True)
            except ServerError as error:
                refused.append(_status(error))
                return None
            return None if data is None else (data, hold)

        async def answer(message: tuple[bytes, Hold], several: Several) -> bytes:
            data, hold = message
            own = call.message(hold, len(data))
            own.deadline = context.time_remaining()
            try:
                return await self._one_of_stream(method, own, data, several)
            finally:
                own.close()
                held.discard(hold)

        try:
            await _in_order(context, read, answer, self._limits.in_flight)
        except* ClientGone:
            refused.clear()
        finally:
            for hold in held:
                hold.close()
        return refused.pop() if refused else None

    async def _one_of_stream(self, method: Method, call: RpcContext, data: bytes, several: Several) -> bytes:
        """Serve a message; return its answer, or the last of several."""
        request = None
        try:
            # Authenticated per message: a key may be revoked while the stream is open.
            call.caller = self._core.authenticate(call.metadata.get("authorization"))
            allow(call.caller, method.action)
            self._core.admit(call.caller)
            call.enter(self._intake.requests)
            request = await self._parsed(method, call, data)
            call.describe(request)
            answer = b""
            if generates(request):
                await self._several(call, request, several)
            else:
                answer = _bytes_of(await method.answer(call, request))
        except (asyncio.CancelledError, ClientGone):
            call.status = GONE
            self._end(call)
            raise
        except Exception as error:
            status = _status(error)
            call.charge_refusal()
            call.status = status.http
            asked = {} if request is None else {"id": request.id, "model_name": request.model_name}
            message = pb.ModelStreamInferResponse(error_message=clipped(status.text), infer_response=asked)
            answer = _bytes_of(message)
        call.bytes_out += len(answer)
        self._end(call)
        return answer

    async def _several(self, call: RpcContext, request: pb.ModelInferRequest, several: Several) -> None:
        write = several()
        async with aclosing(generated(call, request)) as answers:
            async for one in answers:
                answer = _bytes_of(one)
                call.bytes_out += len(answer)
                await write(answer)

    async def _wait(self, call: RpcContext) -> None:
        """Delay the next message of a tenant after large refused ones."""
        seconds = 0.0 if call.caller is None else self._intake.refused.wait(call.caller.tenant)
        if seconds:
            await asyncio.sleep(seconds)

    async def _parsed(self, method: Method, call: RpcContext, data: bytes) -> Any:
        """Parse a message; raw tensors of a large one go to `call.raws`, long work runs in other threads."""
        if len(data) <= PIECE:
            return parse(method.request, data, self._limits)
        if method.request is pb.ModelInferRequest:
            data, call.raws = split_raw(data, self._limits)
            if len(data) <= PIECE:
                return parse(method.request, data, self._limits)
        call.heavy = True
        call.memory.take(len(data) + _ELEMENT * min(len(data), self._limits.typed_elements))
        return await self._intake.offload.run(call.tenant, parse, method.request, data, self._limits)

    def _end(self, call: RpcContext) -> None:
        if self._observe is not None:
            call.end()
            self._observe(call)


async def _in_order(
    context: Any,
    read: Callable[[], Awaitable[T | None]],
    answer: Callable[[T, Several], Awaitable[bytes]],
    in_flight: int,
) -> None:
    """Serve the messages of a stream concurrently; an error cancels in-flight messages.

    Messages with one answer are answered in order.  Those with several do not keep others waiting, as their client
    knows them by their ids.

    Args:
        context: gRPC context of the call.
        read: returns the next message; None at the end.
        answer: returns the answer to one message, empty for none; an exception ends the stream.  A message with several
            answers calls its second argument first, and sends them by the function that this returns.
        in_flight: maximum number of in-flight messages; the client waits beyond it.
    """
    room, writing = asyncio.Semaphore(in_flight), asyncio.Lock()
    waiting: asyncio.Queue[asyncio.Future[bytes | None] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def write(data: bytes) -> None:
        if data:
            async with writing:
                await send(context, data)

    async with asyncio.TaskGroup() as group:

        async def one(data: T, turn: asyncio.Future[bytes | None]) -> None:
            def several() -> Write:
                turn.set_result(None)
                return write

            found = await answer(data, several)
            if not turn.done():
                turn.set_result(found)
                return
            await write(found)
            room.release()

        async def read_all() -> None:
            await room.acquire()
            while (data := await read()) is not None:
                turn = loop.create_future()
                waiting.put_nowait(turn)
                group.create_task(one(data, turn))
                del data
                await room.acquire()
            waiting.put_nowait(None)

        group.create_task(read_all())
        while (turn := await waiting.get()) is not None:
            found = await turn
            if found is not None:
                await write(found)
                room.release()


def _allowed(path: str, method: Method | None, caller: Principal | None) -> Method:
    if method is None:
        raise Unsupported(f"rpc {quoted(path)}", problem="this server has no such rpc")
    if caller is not None:
        allow(caller, method.action)
    return method


def _status(error: Exception) -> Status:
    status = status_of(error)
    if status.http == 500:
        _LOG.error("a call over gRPC failed", exc_info=error)
    return status


def _bytes_of(answer: Message | bytes) -> bytes:
    if isinstance(answer, bytes):
        return answer
    data: bytes = answer.SerializeToString()
    return data
