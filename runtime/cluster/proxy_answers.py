"""Responses of Ray's HTTP proxy while the ingress is lost: 503 with Retry-After, as those of the server."""

from __future__ import annotations

import json

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MIDDLEWARES", "PROXY_CALLBACK", "RetryLater", "middlewares"]

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable of the environment of Ray's nodes that names what makes the proxies' middlewares."""
MIDDLEWARES = "tpeft_deploy.runtime.cluster.proxy_answers.middlewares"

_AFTER = (b"retry-after", b"1")
_LOST = "run a request: the ingress was lost while it had the request, which may have been done. Try again shortly."


class RetryLater:
    """ASGI middleware of Ray's proxy, which returns without a response if the ingress dies with a request.

    Args:
        app: the proxy's application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 503 in place of no response, and add Retry-After to each 503 without one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = _with_retry_after(message)
            await send(message)

        await self._app(scope, receive, sending)
        if not started:
            await _refuse(send)


def middlewares() -> list[Middleware]:
    """Return the middlewares of Ray's proxies; named by `MIDDLEWARES`."""
    return [Middleware(RetryLater)]


def _with_retry_after(message: Message) -> Message:
    headers = [*message.get("headers", ())]
    if message["status"] != 503 or any(name.lower() == b"retry-after" for name, _ in headers):
        return message
    return {**message, "headers": [*headers, _AFTER]}


async def _refuse(send: Send) -> None:
    body = json.dumps({"error": _LOST}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), _AFTER]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
