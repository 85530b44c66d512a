"""URL of the server and of its objects, and the settings of a connection."""

from __future__ import annotations

import os
import re
import ssl
from typing import TypedDict
from urllib.parse import quote

import httpx

from tpeft_deploy import errors

__all__ = ["ConnectionSettings", "affinity", "model_path", "part", "settings_of"]

_KEY = "TPEFT_KEY"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_IDLE_SECONDS = 4.0  # shorter than a server's keep-alive, so that no request meets a closing connection


class ConnectionSettings(TypedDict):
    """Arguments of an httpx client."""

    base_url: str
    headers: dict[str, str]
    verify: ssl.SSLContext | bool
    limits: httpx.Limits


def settings_of(url: str, key: str | None, verify: ssl.SSLContext | str | bool) -> ConnectionSettings:
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


def part(name: str, what: str) -> str:
    """Return a name as part of a path; names that no server has, such as "..", would lead to other paths.

    Args:
        name: name to encode.
        what: kind of name, for the error message.

    Raises:
        InputError: the name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise errors.InputError(
            f"ask for {what} {name!r}",
            expected="a name of at most 128 letters, digits, '.', '_', ':' and '-', the first a letter or digit",
            got=repr(name),
        )
    return quote(name, safe="")


def model_path(name: str) -> str:
    """Return the path of the model `name`, `name/component`, or either with `@version`."""
    model, at, version = name.partition("@")
    task, slash, component = model.partition("/")
    path = f"/v2/models/{part(task, 'task')}" + (f"%2F{part(component, 'component')}" if slash else "")
    return f"{path}/versions/{part(version, 'version')}" if at else path


def affinity(task: str) -> dict[str, str]:
    """Return the header by which a proxy chooses the server of a task; servers ignore it."""
    return {"Tpeft-Task": quote(task, safe="@/:+")}
