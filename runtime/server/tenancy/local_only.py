"""Middleware for a server without keys: serves this machine only, and no foreign page in a local browser."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from tpeft_deploy.errors import Forbidden
from tpeft_deploy.runtime.server.settings import is_loopback
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["LocalOnly", "check"]

_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?")
_OWN_SITE = {b"none", b"same-origin"}
_FIX = "Start the server with keys for others than this machine."


class LocalOnly:
    """ASGI middleware that refuses requests of other machines and sites.

    A foreign page reaches loopback addresses through the browser: by simple requests, which may be cross-origin, and by
    DNS rebinding, a domain that resolves to 127.0.0.1.

    Args:
        application: wrapped application.
        refuse: answers a refused request with an error.
    """

    def __init__(self, application: ASGIApp, refuse: Callable[..., Awaitable[None]]) -> None:
        self._application = application
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse one request."""
        try:
            if scope["type"] == "http":
                check(scope["headers"])
        except Forbidden as error:
            await self._refuse(error, scope, receive, send)
        else:
            await self._application(scope, receive, send)


def check(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Check that a request comes from this machine.

    Args:
        headers: request headers, names in lower case.

    Raises:
        Forbidden: Host or Origin is not local, or the browser reports a cross-site request.
    """
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not _is_local(hosts[0]):
        _refuse("Host", ", ".join(hosts))
    for name, value in headers:
        if name == b"origin" and not _is_local_origin(value.decode("latin-1")):
            _refuse("Origin", value.decode("latin-1"))
        if name == b"sec-fetch-site" and value.strip().lower() not in _OWN_SITE:
            _refuse("Sec-Fetch-Site", value.decode("latin-1"), "none or same-origin")


def _is_local(authority: str) -> bool:
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        return False
    name = found[1].strip("[]").lower().removesuffix(".")
    return name.endswith(".localhost") or is_loopback(name)


def _is_local_origin(origin: str) -> bool:
    scheme, _, authority = origin.partition("://")
    return scheme.lower() in {"http", "https"} and _is_local(authority)


def _refuse(header: str, got: str, expected: str = "a loopback name or address") -> None:
    raise Forbidden(
        f"answer without keys, header {header}", expected=expected, got=quoted(got) if got else "none", fix=_FIX
    )
