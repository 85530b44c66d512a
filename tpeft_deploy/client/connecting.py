"""Where the server is and who asks: what both clients open their connections with."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass

import httpx

from tpeft_deploy import errors

__all__ = ["Settings", "settings_of"]

_KEY = "TPEFT_KEY"
_IDLE_SECONDS = 4.0  # less than servers keep idle connections, so that none is closed while a request is on its way


@dataclass(frozen=True)
class Settings:
    """How httpx is opened.

    Attributes:
        url: of the server.
        headers: of every request.
        verify: how certificates are checked.
        limits: of connections.
    """

    url: str
    headers: dict[str, str]
    verify: ssl.SSLContext | bool
    limits: httpx.Limits


def settings_of(url: str, key: str | None, verify: ssl.SSLContext | str | bool) -> Settings:
    """Check what the user gave.

    Raises:
        InputError: the URL is none of HTTP, or the key cannot be sent.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise errors.InputError(f"connect to {url!r}", expected="a URL", got=str(error)) from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise errors.InputError(f"connect to {url!r}", expected="http://HOST:PORT or https://HOST", got=repr(url))
    # Tensors seldom shrink enough to be worth the time that it takes.
    headers = {"Accept-Encoding": "identity"}
    key = os.environ.get(_KEY) if key is None else key
    if key:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise errors.InputError(
                f"connect to {url!r}", expected="a key of visible ASCII characters", got="one with others"
            )
        headers["Authorization"] = f"Bearer {key}"
    context = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=_IDLE_SECONDS)
    return Settings(url, headers, context, limits)
