"""What the protocols call: one set of operations behind REST and gRPC alike.

Each takes the principal first, checks what its role allows, and raises errors of `tpeft_deploy.errors`; documents are
plain dicts in the field names of the V2 protocol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from tpeft_deploy.runtime.server.tenancy.access import Principal
from tpeft_deploy.runtime.server.v2.messages import InferRequest, InferResponse, LoadParameter

__all__ = ["Core", "Document", "Part"]

Document = dict[str, Any]
Part = tuple[str, AsyncIterator[bytes]]
"""A file of an upload: "weights" or "config", and its bytes as they come."""


class Core(Protocol):
    """The operations of the server.  `tenant` is whose task is meant: None for the principal's own."""

    def live(self) -> bool:
        """Whether the process works at all; no key needed."""

    def ready(self) -> bool:
        """Whether requests are taken: false while starting and draining; no key needed."""

    def authenticate(self, authorization: str | None) -> Principal:
        """Who sent `Authorization: Bearer KEY`.

        Raises:
            Unauthenticated: no key, or one that is unknown, expired or revoked.
        """

    def admit(self, principal: Principal) -> None:
        """Take one inference request from the tenant's quota, before its body is read; spent whatever becomes of it.

        Raises:
            Forbidden: the role allows no inference.
            QuotaExceeded: the tenant has no request left.
        """

    def server_metadata(self, principal: Principal) -> Document:
        """Name, version, extensions."""

    def model_metadata(self, principal: Principal, name: str, version: str = "") -> Document:
        """Name, versions, platform, inputs, outputs."""

    def model_config(self, principal: Principal, name: str, version: str = "") -> Document:
        """Triton's ModelConfig as JSON."""

    def model_ready(self, principal: Principal, name: str, version: str = "") -> bool:
        """Whether a request for the model would be served."""

    async def statistics(self, principal: Principal, name: str = "", version: str = "") -> Document:
        """{"model_stats": [...]}; of all models that the principal sees when no name is given."""

    async def index(self, principal: Principal, *, ready: bool = False) -> list[Document]:
        """[{name, version, state, reason}]; only those that are ready when asked."""

    async def load(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Make a model ready; with "file:..." parameters, register a new version first.  DEPLOY."""

    async def unload(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Take a model off the device and refuse requests for it until it is loaded again.  DEPLOY."""

    async def infer(self, principal: Principal, request: InferRequest) -> InferResponse:
        """Answer a request that was admitted; cancelling stops it."""

    async def register(
        self,
        principal: Principal,
        name: str,
        parts: AsyncIterator[Part],
        *,
        alias: str = "current",
        tenant: str | None = None,
    ) -> Document:
        """A new version of a task from an upload; checked and ready when this returns.  DEPLOY."""

    async def tasks(
        self, principal: Principal, tenant: str | None = None, *, limit: int | None = None, after: str | None = None
    ) -> list[Document]:
        """The tasks that the principal sees, with versions, aliases and where they reside; so many after a name."""

    def task(self, principal: Principal, name: str, tenant: str | None = None) -> Document:
        """One of them."""

    async def point(
        self,
        principal: Principal,
        name: str,
        alias: str,
        version: str,
        tenant: str | None = None,
        expected: str | None = None,
    ) -> Document:
        """Let an alias stand for another version, if it stands for the expected one (any for None) now.  DEPLOY."""

    async def rollback(
        self, principal: Principal, name: str, alias: str, tenant: str | None = None, expected: str | None = None
    ) -> Document:
        """Let an alias stand again for what it stood for before, likewise.  DEPLOY."""

    async def history(
        self, principal: Principal, name: str, alias: str, limit: int = 100, tenant: str | None = None
    ) -> Sequence[Document]:
        """[{version, time, key}]: what an alias stands for and stood for before, the newest first."""

    async def delete(self, principal: Principal, name: str, version: str = "", tenant: str | None = None) -> None:
        """Delete a task, or one version that no alias stands for; requests in flight finish.  DEPLOY."""

    async def publish(self, principal: Principal, name: str, tenant: str) -> Document:
        """Give a tenant's task to all tenants.  ADMIN."""

    async def pin(self, principal: Principal, name: str, *, folded: bool, tenant: str | None = None) -> Document:
        """Keep a task's current version on the device, or in a session of its own.  DEPLOY."""

    async def unpin(self, principal: Principal, name: str, tenant: str | None = None) -> None:
        """Let it leave the device again.  DEPLOY."""

    async def create_key(
        self, principal: Principal, tenant: str, role: str, expires_in: float | None = None
    ) -> Document:
        """{id, tenant, role, expires, key}: the key is shown this once.  ADMIN."""

    async def keys(self, principal: Principal, tenant: str | None = None) -> list[Document]:
        """Ids, tenants, roles, times; never the keys.  ADMIN."""

    async def revoke_key(self, principal: Principal, id: str) -> None:
        """Refuse a key from now on.  ADMIN."""

    async def tenants(self, principal: Principal) -> list[Document]:
        """Tenants, their quotas and what they use.  ADMIN."""

    async def set_tenant(self, principal: Principal, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """Set a tenant's quotas and weight.  ADMIN."""

    async def audit(self, principal: Principal, limit: int = 100, before: int | None = None) -> Sequence[Document]:
        """The newest changes first.  ADMIN."""

    async def metrics(self, principal: Principal) -> bytes:
        """In the text format of Prometheus."""
