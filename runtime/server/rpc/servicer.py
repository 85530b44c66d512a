"""The calls of gRPC: who may make them, how they end, and what is told about them."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc

from tpeft_deploy.errors import Unauthenticated, Unsupported
from tpeft_deploy.runtime.server.access import Action, Principal, allow
from tpeft_deploy.runtime.server.core import Core
from tpeft_deploy.runtime.server.elements import quoted
from tpeft_deploy.runtime.server.exchange import Exchange
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.account import Account
from tpeft_deploy.runtime.server.rpc.limits import Limits
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE, Call, Method
from tpeft_deploy.runtime.server.rpc.streaming import in_order
from tpeft_deploy.runtime.server.rpc.wire import parse
from tpeft_deploy.runtime.server.statuses import Status, status_of

__all__ = ["Observer", "Servicer"]

Observer = Callable[[Exchange], None]
_LOG = logging.getLogger(__name__)
_GONE = 499
_TEXT_BYTES = 1000  # clients take 8 KiB of trailers, in which each byte may become three


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type information
    """Answers the rpcs of `METHODS` by asking a core.

    The key is looked at before a message is received, so that nobody without one makes the server read; rpcs that
    there are not are told from those that there are only with a key.

    Args:
        core: what is asked.
        limits: on messages.
        observe: told of every request that was answered, each of a stream's among them; must not block or raise.
    """

    def __init__(self, core: Core, limits: Limits, observe: Observer | None = None) -> None:
        self._core = core
        self._limits = limits
        self._observe = observe

    def service(self, handler_call_details: Any) -> Any:
        """How to answer a call, from its name and metadata."""
        path: str = handler_call_details.method
        name = path.removeprefix(f"/{SERVICE}/")
        method = METHODS.get(name)
        metadata = _texts(handler_call_details.invocation_metadata)
        account = Account(name, path, metadata) if method else Account("unknown", "unknown", metadata)
        try:
            account.caller = self._caller(method, handler_call_details.invocation_metadata)
            method = _allowed(path, method, account.caller)
        except Exception as error:
            # A stream's handler, as it answers without receiving a message.
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._refuse, error, account))
        call = Call(self._core, self._limits, account.caller, metadata)
        if method.stream:
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._stream, name, method, call))
        return grpc.unary_unary_rpc_method_handler(functools.partial(self._unary, method, call, account))

    def _caller(self, method: Method | None, metadata: Sequence[tuple[str, str | bytes]]) -> Principal | None:
        if method is not None and method.action is Action.HEALTH:
            return None
        found = [value for key, value in metadata if key == "authorization"]
        if len(found) > 1 or any(isinstance(value, bytes) for value in found):
            raise Unauthenticated("authorization", expected="one text", got=f"{len(found)} values")
        return self._core.authenticate(str(found[0]) if found else None)

    async def _refuse(self, error: Exception, account: Account, _: Any, context: Any) -> None:
        status = _status(error)
        account.status = status.http
        self._tell(account)
        await _abort(context, status)

    async def _unary(self, method: Method, call: Call, account: Account, data: bytes, context: Any) -> bytes:
        call.timeout = context.time_remaining()
        account.bytes_in = len(data)
        try:
            request = parse(method.request, data, self._limits)
            account.asked(request)
            answer: bytes = (await method.answer(call, request)).SerializeToString()
        except asyncio.CancelledError:
            account.status = _GONE
            self._tell(account)
            raise
        except Exception as error:
            await self._refuse(error, account, data, context)
            raise  # never comes here, as a refusal raises what ends the call
        account.bytes_out = len(answer)
        self._tell(account)
        return answer

    async def _stream(self, name: str, method: Method, call: Call, _: Any, context: Any) -> None:
        async def answer(data: bytes) -> bytes:
            account = Account(name, f"/{SERVICE}/{name}", call.metadata, call.caller, len(data))
            one = replace(call, timeout=context.time_remaining(), streamed=True)
            return await self._one_of_stream(method, one, account, data)

        await in_order(context, answer, self._limits.in_flight)

    async def _one_of_stream(self, method: Method, call: Call, account: Account, data: bytes) -> bytes:
        request = None
        try:
            # Streams last: a key may be revoked meanwhile.
            call.caller = account.caller = self._core.authenticate(call.metadata.get("authorization"))
            allow(call.caller, method.action)
            request = parse(method.request, data, self._limits)
            account.asked(request)
            message = await method.answer(call, request)
        except asyncio.CancelledError:
            account.status = _GONE
            self._tell(account)
            raise
        except Exception as error:
            status = _status(error)
            account.status = status.http
            asked = {} if request is None else {"id": request.id, "model_name": request.model_name}
            message = pb.ModelStreamInferResponse(error_message=_clipped(status.text), infer_response=asked)
        answer: bytes = message.SerializeToString()
        account.bytes_out = len(answer)
        self._tell(account)
        return answer

    def _tell(self, account: Account) -> None:
        if self._observe is not None:
            account.end()
            self._observe(account)


def _allowed(path: str, method: Method | None, caller: Principal | None) -> Method:
    if method is None:
        raise Unsupported(f"rpc {quoted(path)}", problem="this server has no such rpc")
    if caller is not None:
        allow(caller, method.action)
    return method


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


def _clipped(text: str) -> str:
    data = text.encode()
    return text if len(data) <= _TEXT_BYTES else data[:_TEXT_BYTES].decode(errors="ignore") + "..."
