"""Connection settings of both clients."""

from __future__ import annotations

import os
import ssl
from typing import TypedDict

import httpx

from tpeft_deploy import errors

__all__ = ["Settings", "settings_of"]

_KEY = "TPEFT_KEY"
_IDLE_SECONDS = 4.0  # shorter than a server's keep-alive, so that no request meets a closing connection


class Settings(TypedDict):
    """Arguments of an httpx client."""

    base_url: str
    headers: dict[str, str]
    verify: ssl.SSLContext | bool
    limits: httpx.Limits


def settings_of(url: str, key: str | None, verify: ssl.SSLContext | str | bool) -> Settings:
    """Check URL, key and TLS verification.

    Raises:
        InputError: the URL is not an HTTP URL, or the key has characters that cannot be sent.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise errors.InputError(f"connect to {url!r}", expected="a URL", got=str(error)) from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise errors.InputError(f"connect to {url!r}", expected="http://HOST:PORT or https://HOST", got=repr(url))
    # Compressing tensors seldom pays off.
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
    return {"base_url": url, "headers": headers, "verify": context, "limits": limits}
