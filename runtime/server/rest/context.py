"""A request as handlers see it, and a route of the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import orjson
from starlette.requests import Request

from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.transport.compression import decompress
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["Asked", "Handler", "Route"]


@dataclass
class Asked:
    """A request as handlers see it.

    Attributes:
        core: the operations.
        limits: on bodies.
        request: of starlette.
        caller: whose key it has; None on routes without one.
        intake: budgets and threads.
    """

    core: Service
    limits: RestLimits
    request: Request
    caller: Principal | None
    intake: Intake

    def __post_init__(self) -> None:
        tenant = "" if self.caller is None else self.caller.tenant
        self.memory = self.intake.memory.hold(tenant)
        self.staging = self.intake.staging.hold(tenant)

    def __enter__(self) -> Self:
        """Return the request, which holds what it reads until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give back everything."""
        self.memory.close()
        self.staging.close()

    @property
    def principal(self) -> Principal:
        """Whose key it has."""
        if self.caller is None:
            raise RuntimeError("a route without keys asked for one")
        return self.caller

    def path(self, name: str) -> str:
        """A part of the path; empty where the route has none of that name."""
        return str(self.request.path_params.get(name, ""))

    def query(self, name: str) -> str | None:
        """A query parameter."""
        return self.request.query_params.get(name)

    @property
    def tenant(self) -> str | None:
        """The query parameter `tenant`."""
        found = self.query("tenant")
        if found is not None and not is_name(found):
            raise ProtocolError("read the query parameter 'tenant'", expected="a tenant's name", got=quoted(found))
        return found

    def number(self, name: str) -> int | None:
        """A query parameter that is a whole number."""
        found = self.query(name)
        if found is None:
            return None
        if not (found.isascii() and found.isdigit() and len(found) < 10):
            raise ProtocolError(f"read the query parameter {name!r}", expected="a whole number", got=quoted(found))
        return int(found)

    @property
    def declared(self) -> int:
        """Size of the body, where the client says it; else 0."""
        given = self.request.headers.get("content-length", "")
        return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else 0

    async def body(self, limit: int, fix: str | None = None) -> bytes | bytearray:
        """The body without its encoding, for which room is taken before it is read.

        Args:
            limit: bytes that it may have, before and after decompression.
            fix: what to do about a larger one.

        Raises:
            TooLarge: it is larger.
            QuotaExceeded, Unavailable: there is no room for it.
        """
        declared = self.declared
        if declared > limit:
            raise TooLarge("read a body", expected=f"at most {limit:,} bytes", got=f"{declared:,}", fix=fix)
        self.memory.take(declared)
        body = bytearray()
        async for part in self.request.stream():
            if len(body) + len(part) > limit:
                raise TooLarge("read a body", expected=f"at most {limit:,} bytes", got="more", fix=fix)
            body += part
            if len(body) > self.memory.size:
                self.memory.resize(len(body))
        headers = dict(self.request.headers.raw)
        return await decompress(headers, body, limit, self.memory, self.intake.offload) if body else body

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty one is {}."""
        return self.parsed(await self.body(self.limits.document_bytes))

    @staticmethod
    def parsed(text: bytes | bytearray) -> dict[str, Any]:
        """A text as a JSON object; an empty one is {}."""
        if not text.strip():
            return {}
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ProtocolError("read a body", expected="JSON", problem=str(error)) from None
        if not isinstance(found, dict):
            raise ProtocolError("read a body", expected="a JSON object", got=type(found).__name__)
        return found

    async def fields(self, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
        """The body's fields, each of its kind; those that are missing are left out, others are refused."""
        found = await self.json()
        for name, value in found.items():
            if name not in kinds:
                raise ProtocolError("read a body", expected=f"fields {', '.join(kinds)}", got=quoted(name))
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and kinds[name] is not bool):
                raise ProtocolError(f"read field {name!r}", expected="another type", got=type(value).__name__)
        return found


Handler = Callable[[Asked], Awaitable[object]]


@dataclass(frozen=True)
class Route:
    """One operation over HTTP.

    Attributes:
        method: of HTTP.
        path: its template.
        action: what a key has to allow.
        handler: gives the document to answer with; bytes are text, None is an empty object.
        summary: one line.
        query: parameters -> what they are.
        body: JSON schema of the request's body, or None.
        upload: whether the body is an upload.
    """

    method: str
    path: str
    action: Action
    handler: Handler
    summary: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    upload: bool = False
