"""Request context of the handlers, and the entries of the route table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import msgspec
import orjson
from starlette.requests import Request

from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.server.rest.transport.compression import decompress
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["RequestContext", "Handler", "Route"]

B = TypeVar("B", bound=Body)
_SHOWN = 200


@dataclass
class RequestContext:
    """Request context of a handler: the request, its principal, and the memory and disk space reserved for it.

    Attributes:
        core: the server's operations.
        limits: limits of bodies.
        request: Starlette request.
        caller: principal; None on routes without authentication.
        intake: budgets and threads of the server.
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
        """Return the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the reserved memory and disk space."""
        self.memory.close()
        self.staging.close()

    @property
    def principal(self) -> Principal:
        """The principal of an authenticated request."""
        if self.caller is None:
            raise RuntimeError("a route without keys asked for one")
        return self.caller

    def path(self, name: str) -> str:
        """Return a path parameter; an empty string if the route has none of that name."""
        return str(self.request.path_params.get(name, ""))

    def query(self, name: str) -> str | None:
        """Return a query parameter."""
        return self.request.query_params.get(name)

    @property
    def tenant(self) -> str | None:
        """The query parameter `tenant`."""
        found = self.query("tenant")
        if found is not None and not is_name(found):
            raise ProtocolError("read the query parameter 'tenant'", expected="a tenant's name", got=quoted(found))
        return found

    def number(self, name: str) -> int | None:
        """Return an integer query parameter."""
        found = self.query(name)
        if found is None:
            return None
        if not (found.isascii() and found.isdigit() and len(found) < 10):
            raise ProtocolError(f"read the query parameter {name!r}", expected="a whole number", got=quoted(found))
        return int(found)

    @property
    def declared(self) -> int:
        """Declared size of the body in bytes; 0 if unknown."""
        given = self.request.headers.get("content-length", "")
        return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else 0

    async def body(self, limit: int, fix: str | None = None) -> bytes | bytearray:
        """Read and decompress the body; memory is reserved before it is read.

        Args:
            limit: maximum size, before and after decompression.
            fix: advice for the error about a larger body.

        Raises:
            TooLarge: the body is larger.
            QuotaExceeded, Unavailable: the memory budget is used up.
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
        """Read the body as a JSON object; an empty body is {}."""
        return self.parsed(await self.body(self.limits.document_bytes))

    async def read(self, kind: type[B]) -> B:
        """Read the body as JSON of type `kind`; reject unknown fields and other types."""
        text = await self.body(self.limits.document_bytes)
        try:
            return msgspec.json.decode(text if text.strip() else b"{}", type=kind)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ProtocolError(
                "read a body", expected=f"fields {', '.join(kind.__struct_fields__)}", problem=_line(error)
            ) from None

    @staticmethod
    def parsed(text: bytes | bytearray) -> dict[str, Any]:
        """Parse a JSON object; an empty body is {}."""
        if not text.strip():
            return {}
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ProtocolError("read a body", expected="JSON", problem=str(error)) from None
        if not isinstance(found, dict):
            raise ProtocolError("read a body", expected="a JSON object", got=type(found).__name__)
        return found


Handler = Callable[[RequestContext], Awaitable[object]]


@dataclass(frozen=True)
class Route:
    """One operation over HTTP.

    Attributes:
        method: HTTP method.
        path: path template.
        action: action that the role must allow.
        handler: returns the response document; bytes are text, None is an empty object.
        summary: summary for OpenAPI.
        query: query parameter -> description.
        body: type of the JSON body, or None.
        upload: whether the body is an upload.
    """

    method: str
    path: str
    action: Action
    handler: Handler
    summary: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: type[Body] | None = None
    upload: bool = False


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
