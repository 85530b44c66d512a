"""Administration: keys, tenants, the audit log and the metrics."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from tpeft_deploy.errors import Conflict, ProtocolError, ServerError
from tpeft_deploy.runtime.server.operations.options import Options
from tpeft_deploy.runtime.server.registry import KeyRecord, State, TenantRecord
from tpeft_deploy.runtime.server.telemetry.inference_events import EventBuffer
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.change_rate import ChangeRate
from tpeft_deploy.runtime.server.tenancy.fair_order import Orders
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.tenant_pins import TenantPins
from tpeft_deploy.runtime.server.v2.messages import Document
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["Admin"]

_log = logging.getLogger("tpeft_deploy.server")


class Admin:
    """Operations on keys, tenants, the audit log and the metrics; all but `metrics` need ADMIN.

    Args:
        state: the registry.
        options: configuration of the operations.
        order: orders of the runtime's queues.
        pins: pinned versions of the tenants.
        changes: rate limit of changes per key.
        events: flushed before metrics are rendered.
    """

    def __init__(
        self, state: State, options: Options, order: Orders, pins: TenantPins, changes: ChangeRate, events: EventBuffer
    ) -> None:
        self._state = state
        self._options = options
        self._order = order
        self._pins = pins
        self._changes = changes
        self._events = events
        self._run = options.pools.control.run

    async def sweep(self) -> None:
        """Remove files of deleted adapters and old audit entries, once; called by the server, without a principal."""
        run, days, rows = self._options.pools.changes.run, self._options.audit_days, self._options.audit_rows
        try:
            await run(self._state.tasks.sweep)
        except ServerError as error:  # the store or the database does not answer: retried next time
            _log.warning("cannot remove files of deleted adapters: %s", error)
        with contextlib.suppress(ServerError):  # a full disk: logged, and retried next time
            await run(self._state.audit.sweep, days=days, rows=rows)

    async def create_key(
        self, principal: Principal, tenant: str, role: str, expires_in: float | None = None
    ) -> Document:
        """Create a key: {id, tenant, role, created, expires, revoked, key}; the key itself is shown only here."""
        self._change(principal)
        if not self._options.authenticate:  # the key would outlive this mode, in which every request is an admin's
            raise Conflict(
                f"create a key for tenant {quoted(tenant)}",
                problem="this server asks for none",
                fix="Start it without --no-auth, or use tpeft-deploy keys create.",
            )
        expires = None if expires_in is None else time.time() + expires_in
        record, key = await self._run(self._state.keys.create, tenant, role, by=principal.key, expires=expires)
        return {**_key(record), "key": key}

    async def keys(self, principal: Principal, tenant: str | None = None) -> list[Document]:
        """List keys (of one tenant), without their secrets."""
        allow(principal, Action.ADMIN)
        return [_key(record) for record in self._state.keys.list(tenant)]

    async def revoke_key(self, principal: Principal, id: str) -> None:
        """Revoke a key."""
        allow(principal, Action.ADMIN)
        await self._run(self._state.keys.revoke, id, by=principal.key)

    async def tenants(self, principal: Principal) -> list[Document]:
        """List the tenants, their quotas and their usage."""
        allow(principal, Action.ADMIN)
        return [self._tenant(record) for record in self._state.tenants.list()]

    async def set_tenant(self, principal: Principal, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """Set a tenant's quotas and weight; None is unlimited, fields left out get the server's defaults."""
        self._change(principal)
        known = set(asdict(Quota()))
        if not set(quota) <= known:
            raise ProtocolError(
                f"set the quota of tenant {tenant!r}",
                expected=f"fields among {', '.join(sorted(known))}",
                got=", ".join(sorted(set(quota) - known)),
            )
        own = replace(self._state.tenants.default, **quota)  # type: ignore[arg-type]  # Quota validates its fields
        return self._tenant(await self._run(self._state.tenants.put, tenant, own, by=principal.key))

    async def audit(self, principal: Principal, limit: int = 100, before: int | None = None) -> Sequence[Document]:
        """List at most 1000 audit entries, the newest first; with `before`, only those with a smaller id."""
        allow(principal, Action.ADMIN)
        found = await self._run(self._state.audit.list, max(1, min(limit, 1000)), before)
        return [asdict(record) for record in found]

    async def metrics(self, principal: Principal) -> bytes:
        """Render the metrics in Prometheus text format; any key may read them with `Options.metrics_for_all`."""
        allow(principal, Action.READ if self._options.metrics_for_all else Action.ADMIN)
        self._events.flush()
        return await self._run(self._options.metrics)

    def _change(self, principal: Principal) -> None:
        allow(principal, Action.ADMIN)
        self._changes.spend(principal.key)

    def _tenant(self, record: TenantRecord) -> Document:
        adapters, size = self._state.tasks.usage(record.name)
        return {
            "name": record.name,
            "quota": asdict(record.quota),
            "created": record.created,
            "used": {
                "adapters": adapters,
                "bytes": size,
                "queued_rows": self._order.waiting_rows(record.name),
                **self._pins.used(record.name),
            },
        }


def _key(record: KeyRecord) -> Document:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "role": record.role.value,
        "created": record.created,
        "expires": record.expires,
        "revoked": record.revoked,
    }
