"""The HTTP application: inference first, then the table of routes; every error is {"error": text}."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote

import msgspec
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from tpeft_deploy.errors import NotFound, ProtocolError, ServerError, Unavailable, Unsupported
from tpeft_deploy.runtime.server.context import GONE, RequestContext
from tpeft_deploy.runtime.server.openai.sse import EventStream
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.operations.slices import encoded
from tpeft_deploy.runtime.server.rest import openapi
from tpeft_deploy.runtime.server.rest.context import HttpContext, Receive, Response, Scope, Send
from tpeft_deploy.runtime.server.rest.infer import ClientLeft, InferenceEndpoint, Watch
from tpeft_deploy.runtime.server.rest.routes import ROUTES, Route
from tpeft_deploy.runtime.server.tenancy.access import Action, allow
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.statuses import MethodNotAllowed

__all__ = ["Application", "application", "model_of"]

_MODELS = "/v2/models/"
_SUFFIX = 4  # segment of a path behind that of the model
_NAMES = 2  # in the name of a model: MODEL/COMPONENT
# Components of such names need %2F.
_SUFFIXES = frozenset({"infer", "ready", "config", "stats", "versions", "generate", "generate_stream"})
_INFER = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")


class Application:
    """ASGI application: inference endpoint and the table of routes.

    Args:
        core: the server's operations.
        limits: limits of bodies and tensors.
        observe: called with the context of each finished request, on the event loop; must not block.
        intake: budgets and threads, shared with other protocols.
    """

    def __init__(
        self,
        core: Service,
        limits: RestLimits,
        observe: Callable[[RequestContext], None] | None = None,
        intake: Intake | None = None,
    ) -> None:
        self._core = core
        self._limits = limits
        self._observe = observe
        self._intake = intake or Intake()
        self._infer = InferenceEndpoint(core, limits, self._intake)
        self._several = bool(core.components.several)
        self._table: list[tuple[re.Pattern[str], Route]] = [(compile_path(own.path)[0], own) for own in ROUTES]
        self._table.append((compile_path(openapi.ROUTE.path)[0], openapi.ROUTE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        context = HttpContext(self._core, self._limits, self._intake, scope, receive)
        try:
            asked = _asked(scope, several=self._several)
            if asked is not None and scope["method"] == "POST":
                context.route = _INFER[bool(asked[1])]
                await self._infer(*asked, context, send)
            else:
                await self._other(asked is not None, context, send)
        except asyncio.CancelledError:
            # After the drain timeout pending requests are cancelled; without this, uvicorn would write the response.
            if not context.started:
                error = Unavailable("answer a request", problem="the server stops", fix="Send it again.")
                await context.send(send, *context.refusal(error))
        finally:
            self._end(context)

    async def refuse(self, error: ServerError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with an error, for a middleware."""
        context = HttpContext(self._core, self._limits, self._intake, scope, receive)
        await context.send(send, *context.refusal(error))
        self._end(context)

    def _end(self, context: HttpContext) -> None:
        if self._observe is not None:
            context.end()
            self._observe(context)

    async def _other(self, inference: bool, context: HttpContext, send: Send) -> None:
        try:
            with context:
                document = await self._document(inference, context)
                if isinstance(document, EventStream):
                    await Watch().cancel_on_disconnect(context.send_events(send, document), context.receive)
                    return
        except (ClientDisconnect, ClientLeft):
            context.status = GONE
            return
        except Exception as error:
            answer = context.refusal(error)
        else:
            answer = await _answer(document)
        await context.send(send, *answer)

    async def _document(self, inference: bool, context: HttpContext) -> object:
        route, context.parameters = self._find(context.scope, inference)
        if not isinstance(route, Route) or route.action is not Action.HEALTH:
            # Authenticate before the path is checked: routes are revealed only to authenticated clients.
            context.caller = self._core.authenticate(context.authorization)
        if not isinstance(route, Route):
            raise route
        context.route = route.path
        context.task = context.path("model") or context.path("task")
        if context.caller is not None:
            allow(context.caller, route.action)
        if route.upload and context.headers.get(b"content-encoding", b"identity") not in {b"identity", b""}:
            raise Unsupported("read an upload", expected="no Content-Encoding", got="one")
        context.enter(self._intake.requests)
        return await route.handler(context)

    def _find(self, scope: Scope, inference: bool) -> tuple[Route | ServerError, dict[str, str]]:
        methods = {"POST"} if inference else set[str]()
        path = _path(scope, several=self._several)
        for pattern, route in self._table:
            match = pattern.match(path)
            names = None if match is None else _unquoted(match.groupdict(), several=self._several)
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
    observe: Callable[[RequestContext], None] | None = None,
    intake: Intake | None = None,
) -> Application:
    """Return an `Application` for `core`."""
    return Application(core, limits or RestLimits(), observe, intake)


def _raw(scope: Scope) -> str:
    """Return the undecoded path, as proxies see it; decoding may add segments."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return raw.decode("latin-1")


def model_of(path: str) -> tuple[str, str] | None:
    """Return the model and version of `/v2/models/MODEL[/versions/VERSION]/infer`; None for other paths."""
    parts = path.split("/")
    if len(parts) == 5 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "infer":
        return parts[3], ""
    if len(parts) == 7 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "versions" and parts[6] == "infer":
        return parts[3], parts[5]
    return None


def _path(scope: Scope, *, several: bool) -> str:
    """Return the undecoded path; with several components, the model in one segment.

    Clients do not encode the slash of MODEL/COMPONENT.
    """
    path = _raw(scope)
    if several and path.startswith(_MODELS):
        parts = path.split("/")
        if len(parts) > _SUFFIX and parts[_SUFFIX] not in _SUFFIXES:
            parts[_SUFFIX - 1 : _SUFFIX + 1] = [f"{parts[_SUFFIX - 1]}%2F{parts[_SUFFIX]}"]
            return "/".join(parts)
    return path


def _asked(scope: Scope, *, several: bool = False) -> tuple[str, str] | None:
    """Return the model and version of an inference path; None for other paths."""
    path = _path(scope, several=several)
    asked = model_of(path)
    if asked is None or "%" not in path:
        return asked
    names = _unquoted({"model": asked[0], "version": asked[1]}, several=several)
    return None if names is None else (names["model"], names["version"])


def _unquoted(given: dict[str, str], *, several: bool) -> dict[str, str] | None:
    """Percent-decode the names of a path; return None if a decoded name would contain a path.

    With several components, the name of one behind that of a model is no path.
    """
    found = {part: unquote(name) if "%" in name else name for part, name in given.items()}
    for part, name in found.items():
        names = name.split("/") if several and part == "model" else [name]
        if len(names) > _NAMES or any("/" in own or own in {".", ".."} for own in names):
            return None
    return found


async def _answer(document: object) -> Response:
    # Not compressed: tritonclient's asyncio client always accepts gzip, but decompresses it for tensors only.
    if isinstance(document, bytes):
        return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], [document]
    if isinstance(document, str):
        return 200, [(b"content-type", b"text/plain; charset=utf-8")], [document.encode()]
    if isinstance(document, msgspec.Raw):  # encoded already
        return 200, [(b"content-type", b"application/json")], [bytes(document)]
    return 200, [(b"content-type", b"application/json")], await encoded({} if document is None else document)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message: Any = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
