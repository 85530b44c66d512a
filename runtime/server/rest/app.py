"""The HTTP application: inference first, then the table of routes; every error is {"error": text}."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, unquote

from starlette.requests import ClientDisconnect, Request
from starlette.routing import compile_path

from tpeft_deploy.errors import NotFound, ProtocolError, ServerError, Unavailable, Unsupported
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.operations.slices import encoded
from tpeft_deploy.runtime.server.rest import openapi
from tpeft_deploy.runtime.server.rest.context import Asked, Route
from tpeft_deploy.runtime.server.rest.infer import Inferring, Receive, Scope, Send, model_of
from tpeft_deploy.runtime.server.rest.responses import GONE, Exchanged, told
from tpeft_deploy.runtime.server.rest.routes import ROUTES
from tpeft_deploy.runtime.server.telemetry.request_record import Exchange
from tpeft_deploy.runtime.server.tenancy.access import Action, allow
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.statuses import MethodNotAllowed

__all__ = ["Application", "application"]

_INFER = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")


class Application:
    """An ASGI application.

    Args:
        core: the operations.
        limits: on bodies and tensors.
        observe: told of each request once it was answered; on the event loop, so it must not block.
        intake: budgets and threads, shared with other protocols.
    """

    def __init__(
        self,
        core: Service,
        limits: RestLimits,
        observe: Callable[[Exchange], None] | None = None,
        intake: Intake | None = None,
    ) -> None:
        self._core = core
        self._limits = limits
        self._observe = observe
        self._intake = intake or Intake()
        self._infer = Inferring(core, limits, self._intake)
        self._table: list[tuple[re.Pattern[str], Route]] = [(compile_path(own.path)[0], own) for own in ROUTES]
        self._table.append((compile_path(openapi.ROUTE.path)[0], openapi.ROUTE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        exchanged = Exchanged(scope["method"], scope["headers"])
        try:
            asked = _asked(scope)
            if asked is not None and scope["method"] == "POST":
                exchanged.route = _INFER[bool(asked[1])]
                await self._infer(*asked, exchanged, receive, send)
            else:
                await self._other(asked is not None, exchanged, scope, receive, send)
        except asyncio.CancelledError:
            # The time of a drain is over: what is left is cancelled, and would be answered without our words.
            if not exchanged.started:
                error = Unavailable("answer a request", problem="the server stops", fix="Ask another, or come again.")
                await exchanged.send(send, *told(error, exchanged))
        finally:
            if self._observe is not None:
                exchanged.end()
                self._observe(exchanged)

    async def _other(self, inference: bool, exchanged: Exchanged, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            document = await self._document(inference, exchanged, scope, receive)
        except ClientDisconnect:
            exchanged.status = GONE
            return
        except Exception as error:
            answer = told(error, exchanged)
        else:
            answer = await _answer(document)
        await exchanged.send(send, *answer)

    async def _document(self, inference: bool, exchanged: Exchanged, scope: Scope, receive: Receive) -> object:
        route, parameters = self._find(scope, inference)
        if isinstance(route, Route) and route.action is Action.HEALTH:
            exchanged.route = route.path
            return await route.handler(Asked(self._core, self._limits, Request(scope, receive), None, self._intake))
        # Before anything is said of the path: what there is, is for those with a key.
        principal = exchanged.caller = self._core.authenticate(exchanged.authorization)
        if not isinstance(route, Route):
            raise route
        exchanged.route = route.path
        exchanged.task = parameters.get("model") or parameters.get("task") or ""
        allow(principal, route.action)
        if route.upload and exchanged.headers.get(b"content-encoding", b"identity") not in {b"identity", b""}:
            raise Unsupported("read an upload", expected="no Content-Encoding", got="one")
        request = Request({**scope, "path_params": parameters}, receive)
        asked = Asked(self._core, self._limits, request, principal, self._intake)
        with self._intake.requests.one(principal.key), asked:
            return await route.handler(asked)

    def _find(self, scope: Scope, inference: bool) -> tuple[Route | ServerError, dict[str, str]]:
        methods = {"POST"} if inference else set[str]()
        path = _raw(scope)
        for pattern, route in self._table:
            match = pattern.match(path)
            names = None if match is None else _unquoted(match.groupdict())
            if names is not None:
                if route.method == scope["method"]:
                    return route, names
                methods.add(route.method)
        if methods:
            return MethodNotAllowed(scope["method"], methods), {}
        if "%" in path:
            wanted = "a route, in which only names are percent-encoded, and without '/', '.' and '..'"
            return ProtocolError("answer a request", expected=wanted, got="another path"), {}
        return NotFound("answer a request", problem="there is no such route", fix="GET /openapi.json lists them."), {}


def application(
    core: Service,
    limits: RestLimits | None = None,
    observe: Callable[[Exchange], None] | None = None,
    intake: Intake | None = None,
) -> Application:
    """See `Application`."""
    return Application(core, limits or RestLimits(), observe, intake)


def _raw(scope: Scope) -> str:
    """The path as it came: proxies look at that, and what is decoded may have other parts."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return raw.decode("latin-1")


def _asked(scope: Scope) -> tuple[str, str] | None:
    """Model and version of the path of inference; None for other paths."""
    path = _raw(scope)
    asked = model_of(path)
    if asked is None or "%" not in path:
        return asked
    names = _unquoted({"model": asked[0], "version": asked[1]})
    return None if names is None else (names["model"], names["version"])


def _unquoted(names: dict[str, str]) -> dict[str, str] | None:
    """Names in a path without percent-encoding; None where one would be a path."""
    found = {part: unquote(name) if "%" in name else name for part, name in names.items()}
    return None if any("/" in name or name in {".", ".."} for name in found.values()) else found


async def _answer(document: object) -> tuple[int, list[tuple[bytes, bytes]], Sequence[bytes]]:
    # Not compressed: tritonclient's client for asyncio always says that it takes gzip, and reads it for tensors only.
    if isinstance(document, bytes):
        return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], [document]
    return 200, [(b"content-type", b"application/json")], await encoded({} if document is None else document)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message: Any = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
