"""Tenants and what they are allowed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, insert, select, update

from tpeft_deploy.manifest import check_name
from tpeft_deploy.runtime.server.quotas import Quota
from tpeft_deploy.runtime.server.registry import audit, database
from tpeft_deploy.runtime.server.registry.database import Database

__all__ = ["TenantRecord", "Tenants", "ensure"]


@dataclass(frozen=True)
class TenantRecord:
    """A tenant; `created` in seconds since 1970."""

    name: str
    quota: Quota
    created: float


class Tenants:
    """Tenants by name; read from memory, which `refresh` brings up to date.

    Args:
        database: where they are.
        default: the quota of a tenant that has none of its own.
    """

    def __init__(self, database: Database, default: Quota) -> None:
        self._database = database
        self._default = default
        self._known: dict[str, TenantRecord] = {}

    def quota(self, tenant: str) -> Quota:
        """A tenant's quota now; the default for one that was never seen."""
        found = self._known.get(tenant)
        return self._default if found is None else found.quota

    def list(self) -> list[TenantRecord]:
        """All tenants, by name."""
        return sorted(self._known.values(), key=lambda record: record.name)

    def put(self, tenant: str, quota: Quota, *, by: str) -> TenantRecord:
        """Set a tenant's quota, making the tenant where there is none.

        Raises:
            BundleError: the name is not allowed.
        """
        check_name(tenant, "tenant")
        with self._database.writing() as connection:
            ensure(connection, tenant)
            own = update(database.tenants).where(database.tenants.c.name == tenant)
            connection.execute(own.values(quota=asdict(quota)))
            audit.write(connection, by, tenant, "set quota", tenant, **asdict(quota))
            self._database.changed(connection)
            self.refresh(connection)
        return self._known[tenant]

    def refresh(self, connection: Connection) -> None:
        """Read what is there now."""
        found = connection.execute(select(database.tenants)).mappings()
        self._known = {row["name"]: self._record(row["name"], row["quota"], row["created"]) for row in found}

    def _record(self, name: str, quota: dict[str, float | None], created: float) -> TenantRecord:
        return TenantRecord(name, Quota(**quota) if quota else self._default, created)  # type: ignore[arg-type]


def ensure(connection: Connection, tenant: str) -> None:
    """Make a tenant where there is none, as part of a transaction."""
    if connection.scalar(select(database.tenants.c.name).where(database.tenants.c.name == tenant)) is None:
        connection.execute(insert(database.tenants).values(name=tenant, quota={}, created=time.time()))
