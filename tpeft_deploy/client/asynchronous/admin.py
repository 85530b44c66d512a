"""The asynchronous client: keys, tenants and the audit log."""

from __future__ import annotations

from collections.abc import Mapping

from tpeft_deploy.client import calls
from tpeft_deploy.client.answers import Document
from tpeft_deploy.client.asynchronous.connection import AsyncServerConnection

__all__ = ["AsyncAdminCalls"]


class AsyncAdminCalls(AsyncServerConnection):
    """Keys, tenants and the audit log; they need an admin's key."""

    async def keys(self) -> list[Document]:
        """List ids, tenants, roles and times of keys, without the keys; needs an admin's key."""
        return await self._do(calls.keys(self._tenant))

    async def create_key(self, tenant: str, role: str, *, expires_in: float | None = None) -> Document:
        """Create a key, returned only this once under `key`; needs an admin's key.

        Args:
            tenant: tenant that the key is for; created when it does not exist.
            role: "infer", "deploy" or "admin".
            expires_in: seconds until the key expires (default never).

        Returns:
            The key with its id, tenant, role and times.
        """
        return await self._do(calls.create_key(tenant, role, expires_in))

    async def revoke_key(self, id: str) -> None:
        """Revoke a key: the server refuses it from now on; needs an admin's key.

        Args:
            id: id of the key, as `keys` lists it.

        Raises:
            NotFound: no key has this id.
        """
        return await self._do(calls.revoke_key(id))

    async def tenants(self) -> list[Document]:
        """List tenants with their quotas and usage; needs an admin's key."""
        return await self._do(calls.tenants())

    async def set_tenant(self, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """Set quotas of a tenant; needs an admin's key.

        Args:
            tenant: name of the tenant; created when it does not exist.
            quota: quota name -> limit, None for no limit: requests_per_s, rows_per_s, queue_share, adapters, bytes,
                pins, folded, tokens_per_min, and weight.  Quotas left out get the server's default.

        Returns:
            The tenant afterwards.
        """
        return await self._do(calls.set_tenant(tenant, quota))

    async def audit(self, limit: int = 100, before: int | None = None) -> list[Document]:
        """List changes of keys, tenants and tasks, newest first; needs an admin's key.

        Args:
            limit: maximum number of entries (default 100, largest 1000).
            before: id of the last entry of the page before (default the first page).
        """
        return await self._do(calls.audit(limit, before))
