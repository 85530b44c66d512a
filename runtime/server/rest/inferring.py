"""The path of inference over HTTP, as a plain ASGI application: what is called most is short."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.core import Core
from tpeft_deploy.runtime.server.elements import quoted
from tpeft_deploy.runtime.server.rest.answering import Exchanged, send_error
from tpeft_deploy.runtime.server.rest.compression import compress, decompress
from tpeft_deploy.runtime.server.rest.framing import ADAPTER_HEADERS, decode, encode
from tpeft_deploy.runtime.server.rest.heads import Heads
from tpeft_deploy.runtime.server.rest.leaving import Left, Watch
from tpeft_deploy.runtime.server.rest.limits import Limits

__all__ = ["Inferring", "Receive", "Scope", "Send", "model_of", "read_body"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_GONE = 499  # the client went away: nobody sees this status but logs and metrics


def model_of(path: str) -> tuple[str, str] | None:
    """Model and version of `/v2/models/MODEL[/versions/VERSION]/infer`; None for other paths."""
    parts = path.split("/")
    if len(parts) == 5 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "infer":
        return parts[3], ""
    if len(parts) == 7 and parts[1] == "v2" and parts[2] == "models" and parts[4] == "versions" and parts[6] == "infer":
        return parts[3], parts[5]
    return None


class Inferring:
    """Answers `POST /v2/models/MODEL[/versions/VERSION]/infer`.

    Args:
        core: the operations.
        limits: on bodies and tensors.
    """

    def __init__(self, core: Core, limits: Limits) -> None:
        self._core = core
        self._limits = limits
        self._heads = Heads(limits)
        self._watch = Watch()

    async def __call__(self, model: str, version: str, exchanged: Exchanged, receive: Receive, send: Send) -> None:
        """Answer one request."""
        headers = exchanged.headers
        try:
            exchanged.caller = principal = self._core.authenticate(exchanged.authorization)
            exchanged.task = model
            body = await read_body(headers, receive, self._limits.body_bytes, exchanged)
            body = decompress(headers, body, self._limits.body_bytes)
            framed = decode(model, version, headers, body, self._heads, _adapter(headers))
            del body
            response = await self._watch.unless_left(self._core.infer(principal, framed.request), receive)
            own, answer = encode(response, framed)
        except Left:
            exchanged.status = _GONE
            return
        except Exception as error:
            await send_error(error, exchanged, send)
            return
        encoding, answer = compress(headers, answer)
        if encoding is not None:
            own.append((b"content-encoding", encoding))
        await exchanged.send(send, 200, own, answer)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, exchanged: Exchanged) -> bytes:
    """All of a body.

    Raises:
        TooLarge: it is larger than `limit` bytes; what is beyond is not kept.
    """
    given = headers.get(b"content-length", b"")
    if given.isdigit() and int(given) > limit:
        raise TooLarge("read a body", expected=f"at most {limit:,} bytes", got=f"{int(given):,}")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Left
        part = message.get("body", b"")
        size += len(part)
        exchanged.bytes_in = size
        if size > limit:
            raise TooLarge("read a body", expected=f"at most {limit:,} bytes", got="more")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _adapter(headers: Mapping[bytes, bytes]) -> str | None:
    if ADAPTER_HEADERS.isdisjoint(headers):
        return None
    found = {headers[name] for name in ADAPTER_HEADERS if name in headers}
    if len(found) > 1:
        names = ", ".join(quoted(name.decode("latin-1")) for name in sorted(found))
        raise ProtocolError("adapter", expected="one task for the whole batch", got=f"{names} in headers")
    return found.pop().decode("latin-1")
