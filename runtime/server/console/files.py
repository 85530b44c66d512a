"""Middleware that serves the files of the console; they need no key, as they hold nothing of the server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.types import ASGIApp, Receive, Scope, Send

from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.tenancy.intake import Intake

__all__ = ["Console", "POLICY"]

POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind} 'self'" for kind in ("script-src", "style-src", "connect-src")),
        "img-src 'self' data: blob:",
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""Content Security Policy of the page: code and connections of this server only, and no code from text."""

_ROOT = "/console"
_PAGE = f"{_ROOT}/"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_HASHED = "public, max-age=31536000, immutable"
_METHODS = ("GET", "HEAD")


@dataclass(frozen=True)
class _File:
    body: bytes
    etag: str
    headers: tuple[tuple[bytes, bytes], ...]


class Console:
    """ASGI middleware with the console under `/console/`; passes everything else on.

    Args:
        application: wrapped application, which also answers unknown paths below `/console/`.
        keys: whether the server asks for keys, which the page reads from `server.json`.
        intake: budgets of the server, for the request context.
        observe: called with the context of each request answered here.
    """

    def __init__(
        self, application: ASGIApp, intake: Intake, observe: Callable[[RequestContext], None], *, keys: bool = True
    ) -> None:
        self._application = application
        self._intake = intake
        self._observe = observe
        place = files("tpeft_deploy.runtime.server") / "console" / "static"
        self._files = {f"{_ROOT}/{name}": _file(name, own.read_bytes()) for name, own in _found(place)}
        self._files[f"{_PAGE}server.json"] = _file("server.json", json.dumps({"keys": keys}).encode())
        self._files[_PAGE] = self._files.pop(f"{_ROOT}/index.html")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        path = scope["path"] if scope["type"] == "http" else ""
        if (path != _ROOT and path not in self._files) or scope["method"] not in _METHODS:
            await self._application(scope, receive, send)
            return
        headers = dict(scope["headers"])
        context = RequestContext("http", scope["method"], self._intake, headers.get(b"x-request-id", b""), "")
        context.route = _ROOT if path in {_ROOT, _PAGE} else f"{_ROOT}/{{file}}"
        await self._answer(path, headers.get(b"if-none-match", b""), context, send)
        context.end()
        self._observe(context)

    async def _answer(self, path: str, known: bytes, context: RequestContext, send: Send) -> None:
        if path == _ROOT:  # relative, as a proxy may serve this under another path
            moved = ((b"location", b"console/"), (b"content-length", b"0"))
            await _send(send, context, 307, moved, b"")
            return
        own = self._files[path]
        if own.etag.encode() in known or known.strip() == b"*":
            await _send(send, context, 304, own.headers, b"")
            return
        length = (b"content-length", str(len(own.body)).encode())
        await _send(send, context, 200, (*own.headers, length), own.body if context.method == "GET" else b"")


def _found(place: Traversable, folder: str = "") -> list[tuple[str, Traversable]]:
    """Return the files of a directory and the directories in it, by their paths."""
    found = []
    for own in place.iterdir():
        found += _found(own, f"{folder}{own.name}/") if own.is_dir() else [(f"{folder}{own.name}", own)]
    return [(name, own) for name, own in found if f".{name.rpartition('.')[2]}" in _TYPES]


def _file(name: str, body: bytes) -> _File:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        **_HEADERS,
        "content-type": _TYPES[f".{name.rpartition('.')[2]}"],
        "cache-control": _HASHED if name.startswith("assets/") else "no-cache",
        "etag": etag,
    }
    return _File(body, etag, tuple((key.encode(), value.encode()) for key, value in headers.items()))


async def _send(
    send: Callable[..., Awaitable[None]],
    context: RequestContext,
    status: int,
    headers: tuple[tuple[bytes, bytes], ...],
    body: bytes,
) -> None:
    context.status, context.bytes_out = status, len(body)
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, (b"x-request-id", context.id_bytes)]}
    )
    await send({"type": "http.response.body", "body": body})
