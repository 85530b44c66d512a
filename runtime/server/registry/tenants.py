"""Tenants and their quotas."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, insert, select, update

from tpeft_deploy.errors import NotFound, QuotaExceeded
from tpeft_deploy.runtime.server.registry import audit, queries, schema
from tpeft_deploy.runtime.server.registry.cached import Latest
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.names import check_tenant
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.tenancy.quotas import Quota, Quotas

__all__ = ["TenantRecord", "Tenants", "check_room", "ensure"]


@dataclass(frozen=True)
class TenantRecord:
    """A tenant; `created` in seconds since 1970."""

    name: str
    quota: Quota
    created: float


class Tenants:
    """Tenants by name, read from a cache that `update_cache` refreshes.

    Args:
        database: database of the registry.
        default: quota of tenants without one.

    Attributes:
        default: quota of tenants without one.
        quota: current quota of each tenant.
    """

    def __init__(self, database: Database, default: Quota) -> None:
        self._database = database
        self.default = default
        self.quota = Quotas(default)
        self._latest: Latest[dict[str, TenantRecord]] = Latest({}, self._publish)

    def get(self, name: str) -> TenantRecord:
        """Return a tenant.

        Raises:
            NotFound: there is no tenant of that name.
        """
        found = self._latest.value.get(name)
        if found is None:
            raise NotFound(f"find tenant {name!r}", problem="there is none of that name")
        return found

    def list(self) -> list[TenantRecord]:
        """List all tenants, sorted by name."""
        return sorted(self._latest.value.values(), key=lambda record: record.name)

    def put(self, tenant: str, quota: Quota, *, by: str) -> TenantRecord:
        """Set a tenant's quota; the tenant is created when it does not exist.

        Raises:
            ProtocolError: the name is not allowed.
        """
        check_tenant(tenant)
        with self._database.writing() as connection:
            ensure(self._database, connection, tenant)
            own = update(schema.tenants).where(schema.tenants.c.name == tenant)
            connection.execute(own.values(quota=asdict(quota)))
            audit.write(connection, by, tenant, "set quota", tenant, **asdict(quota))
            changes, known = self._database.changed(connection), self.read(connection)
        self.update_cache(changes, known)
        return known[tenant]

    def read(self, connection: Connection) -> dict[str, TenantRecord]:
        """Read all tenants, as part of a transaction."""
        found = connection.execute(select(schema.tenants)).mappings()
        return {row["name"]: self._record(row["name"], row["quota"], row["created"]) for row in found}

    def update_cache(self, changes: int, known: dict[str, TenantRecord]) -> None:
        """Update the cache with tenants that were read when the database had a change counter."""
        self._latest.put(changes, known)

    def _publish(self, known: dict[str, TenantRecord]) -> None:
        self.quota.known = {name: record.quota for name, record in known.items()}

    def _record(self, name: str, quota: dict[str, float | None], created: float) -> TenantRecord:
        # Quotas stored by earlier servers lack these fields.
        newer = {field: getattr(self.default, field) for field in ("pins", "folded", "tokens_per_min")}
        own = Quota(**{**newer, **quota}) if quota else self.default
        return TenantRecord(name, own, created)


def ensure(own: Database, connection: Connection, tenant: str) -> None:
    """Create a tenant when it does not exist, as part of a transaction."""
    if connection.scalar(select(schema.tenants.c.name).where(schema.tenants.c.name == tenant)) is None:
        connection.execute(insert(schema.tenants).values(name=tenant, quota={}, created=time.time()))
        own.changed(connection)


def check_room(connection: Connection, tenant: str, quota: Quota, size: int) -> None:
    """Check that a tenant may register one more adapter, as part of a transaction.

    Args:
        connection: connection with a transaction.
        tenant: tenant of the task; shared tasks count for none.
        quota: the tenant's quota.
        size: bytes of the adapter.

    Raises:
        QuotaExceeded: the quota of adapters or bytes is used up.
    """
    if tenant == SHARED or (quota.adapters is None and quota.bytes is None):
        return
    count, total = queries.usage(connection, tenant)
    for what, limit, would in (("adapters", quota.adapters, count + 1), ("bytes", quota.bytes, total + size)):
        if limit is not None and would > limit:
            raise QuotaExceeded(
                f"register an adapter of tenant {tenant!r}",
                expected=f"at most {limit:,} {what}",
                got=f"{would:,} with this one",
                fix="Delete versions that are not needed, or ask for a larger quota.",
            )
