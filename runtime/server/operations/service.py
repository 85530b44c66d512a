"""The server's operations, shared by REST and gRPC: each checks the role, then delegates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import Unauthenticated
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.server.isolation.pool import Direct
from tpeft_deploy.runtime.server.operations.admin import Admin
from tpeft_deploy.runtime.server.operations.admission import Admission
from tpeft_deploy.runtime.server.operations.components import Components
from tpeft_deploy.runtime.server.operations.generation import Generations
from tpeft_deploy.runtime.server.operations.inference import Inference
from tpeft_deploy.runtime.server.operations.models import Model, Models, page
from tpeft_deploy.runtime.server.operations.options import Options
from tpeft_deploy.runtime.server.operations.repository import ModelRepository
from tpeft_deploy.runtime.server.operations.slices import Turns, in_slices
from tpeft_deploy.runtime.server.operations.tasks import Management, owner_of
from tpeft_deploy.runtime.server.registry import ALWAYS, CURRENT, Condition, State, TaskRecord
from tpeft_deploy.runtime.server.telemetry.inference_events import EventBuffer
from tpeft_deploy.runtime.server.telemetry.statistics import Statistics
from tpeft_deploy.runtime.server.tenancy.access import LOCAL, SHARED, Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.change_rate import ChangeRate
from tpeft_deploy.runtime.server.tenancy.fair_order import Orders
from tpeft_deploy.runtime.server.tenancy.lease_renewal import open_meter
from tpeft_deploy.runtime.server.tenancy.shared_meter import LeaseFigures
from tpeft_deploy.runtime.server.tenancy.tenant_pins import TenantPins
from tpeft_deploy.runtime.server.v2 import metadata
from tpeft_deploy.runtime.server.v2.largest_body import largest_body
from tpeft_deploy.runtime.server.v2.messages import Document, InferRequest, InferResponse, LoadParameter, UploadPart
from tpeft_deploy.runtime.server.v2.server_metadata import ServerMetadata

__all__ = ["Service"]

_SWEEP_SECONDS = 300.0


class Service:
    """Operations of one bundle for many tenants.

    Each operation takes the principal first, checks what its role allows, and raises errors of `tpeft_deploy.errors`.
    Documents are plain dicts in the field names of the V2 protocol. `tenant` names the owner of a task; None for the
    principal's tenant. Changes need DEPLOY.

    Args:
        runtime: runs the bundle, with `order` as the order of its queue.
        bundle: the served bundle.
        state: the registry.
        order: orders of the runtime's queues.
        options: configuration.

    Attributes:
        admin: operations on keys, tenants, the audit log and the metrics.
        generations: generation of text, for the protocols that have it.
        infer: `Inference.infer`; not wrapped, as it is called most.
        repository: loading and unloading of models.
        load: `ModelRepository.load`.
        components: components of the bundle, as they are named by clients.
        largest_body: size of the largest useful request body; None if the model's inputs are unbounded.
    """

    def __init__(
        self, runtime: Runtime, bundle: Bundle, state: State, order: Orders, options: Options | None = None
    ) -> None:
        self._options = options or Options()
        pools = self._pools = self._options.pools
        self._lists = Turns()
        self._metadata = ServerMetadata(bundle)
        self.components = Components(bundle)
        rows = self._options.limits.max_request_rows
        bodies = [largest_body(own, rows) for own in self.components.manifests.values()]
        self.largest_body = None if None in bodies else max(body for body in bodies if body is not None)
        self._runtime = runtime
        self._state = state
        self._ready = True
        self._meter, self._lease = open_meter(state.tenants.quota, state.leases)
        self._changes = ChangeRate(self._options.changes_per_s)
        self._statistics = Statistics()
        self._models = Models(bundle, state)
        self._events = EventBuffer(self._statistics.inference, self._options.observe)
        publish = self._events.publish
        self._inference = Inference(runtime, bundle, self._models.target, self._meter.spend_rows, publish)
        self.generations = Generations(runtime, bundle, self._models, self._meter, self.accepting, publish, pools)
        self.infer: Callable[[Principal, InferRequest], Coroutine[Any, Any, InferResponse]] = self._inference.infer
        self._management = Management(
            runtime,
            self._models,
            state,
            self._statistics,
            Admission(bundle, runtime, state.tasks.read).check,
            self._options.reader or Direct(bundle, pools.uploads),
            max_upload_bytes=self._options.max_upload_bytes,
            pins=TenantPins(runtime, state.tenants.quota, self._options.max_folded, pools.uploads),
            pools=pools,
        )
        self.repository = ModelRepository(
            runtime, bundle, state, self._models, self._management, self._change, self._options.max_upload_bytes, pools
        )
        self.load = self.repository.load
        self.admin = Admin(state, self._options, order, self._management.pins, self._changes, self._events)
        self._management.follow()

    def live(self) -> bool:
        """Return whether the process is alive; needs no key."""
        return True

    def ready(self) -> bool:
        """Return whether the server is ready: false while starting and draining; needs no key."""
        return self._ready and self._state.intact and (self._lease is None or self._lease.has_begun())

    def accepting(self) -> bool:
        """Whether inference requests are accepted."""
        return self._inference.accepting

    def drain(self) -> None:
        """Report not ready; requests are still accepted."""
        self._ready = False

    def refuse(self) -> None:
        """Stop accepting inference requests; in-flight requests finish."""
        self._ready = self._inference.accepting = False

    async def sweep(self, seconds: float = _SWEEP_SECONDS) -> None:
        """Remove files of deleted adapters and old audit entries every `seconds`, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.admin.sweep()

    def lease(self) -> LeaseFigures | None:
        """Return the lease of rates, for the metrics; None if no other server shares them."""
        return None if self._lease is None else self._lease.figures()

    async def renew_lease(self) -> None:
        """Renew the lease of rates in the background, until cancelled; returns if no other server shares them."""
        if self._lease is not None:
            await self._lease.keep(self._pools.control.run)

    def authenticate(self, authorization: str | None) -> Principal:
        """Return the principal of `Authorization: Bearer KEY`.

        Raises:
            Unauthenticated: the key is missing, unknown, expired or revoked.
        """
        if not self._options.authenticate:
            return LOCAL
        if authorization is not None and authorization.startswith("Bearer "):  # fast path for the usual spelling
            return self._state.keys.authenticate(authorization[7:].strip())
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated(
                "authenticate",
                expected="a header Authorization: Bearer KEY",
                got="none" if not authorization else "another scheme",
                fix="tpeft-deploy keys create makes keys.",
            )
        return self._state.keys.authenticate(key.strip())

    def admit(self, principal: Principal) -> None:
        """Spend one inference request of the tenant's quota, before the body is read; never refunded.

        Raises:
            Forbidden: the role allows no inference.
            QuotaExceeded: the tenant has no request left.
        """
        allow(principal, Action.INFER)
        self._meter.spend_request(principal.tenant, time.monotonic())

    def server_metadata(self, principal: Principal) -> Document:
        """Return name, version, extensions and bundle of the server, and tenant and role of the caller."""
        allow(principal, Action.READ)
        return self._metadata.document(principal)

    def model_metadata(self, principal: Principal, name: str, version: str = "") -> Document:
        """Return name, versions, platform, inputs and outputs of a model."""
        model, component = self._model(principal, name, version)
        manifest = self.components.manifest(model.name, component)
        return metadata.metadata(manifest, name, list(model.versions), mixed=model.mixed)

    def model_config(self, principal: Principal, name: str, version: str = "") -> Document:
        """Return a model's configuration in the fields of Triton's ModelConfig."""
        model, component = self._model(principal, name, version)
        limits = self._options.limits
        manifest = self.components.manifest(model.name, component)
        return metadata.config(
            manifest,
            name,
            list(model.versions),
            max_rows=limits.max_rows,
            max_delay=limits.max_delay,
            mixed=model.mixed,
            decoupled=component is None and manifest.decoder is not None and bool(manifest.text),
        )

    def model_ready(self, principal: Principal, name: str, version: str = "") -> bool:
        """Return whether a request for the model would be served."""
        return self._ready and self._models.is_ready(self._model(principal, name, version)[0])

    async def statistics(self, principal: Principal, name: str = "", version: str = "") -> Document:
        """Return {"model_stats": [...]} of one model, or of all models that the principal sees."""
        asked = None
        if name:
            own, asked = self._model(principal, name, version)
            models = iter([own])
        else:
            allow(principal, Action.READ)
            models = await self._visible(principal.tenant)
        self._events.flush()
        asked_by = None if Action.ADMIN in principal.actions else principal.tenant
        found: list[Document] = []

        def show(model: Model) -> None:
            found.extend(
                self._statistics.document(model.tenant, shown, number, asked_by)
                for shown in self.components.names(model.name, asked)
                for number in model.versions
            )

        async with self._lists.turn(principal.tenant):
            await in_slices(models, show)
        return {"model_stats": found}

    async def index(self, principal: Principal, *, ready: bool = False) -> list[Document]:
        """List models as {name, version, state, reason}; only the ready ones with `ready`."""
        allow(principal, Action.READ)
        found: list[Document] = []

        def show(model: Model) -> None:
            is_ready = self._models.is_ready(model)
            if is_ready or not ready:
                state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", "unloaded")
                found.extend(
                    {"name": shown, "version": number, "state": state, "reason": reason}
                    for shown in self.components.names(model.name)
                    for number in model.versions
                )

        async with self._lists.turn(principal.tenant):
            await in_slices(await self._visible(principal.tenant), show)
        return found

    async def unload(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Unload a model: requests for it are refused until it is loaded again."""
        model = await self.repository.unload(principal, name, parameters)
        self._events.flush()
        self._statistics.drop(model.tenant, model.name)
        self._options.forget(model.tenant, model.name)

    async def register(
        self,
        principal: Principal,
        name: str,
        parts: AsyncIterator[UploadPart],
        *,
        alias: str = CURRENT,
        tenant: str | None = None,
        condition: Condition = ALWAYS,
    ) -> Document:
        """Register an upload as a new version of a task; checked and ready when this returns."""
        self._change(principal)
        return self._shown(
            await self._management.register(principal, name, parts, alias=alias, tenant=tenant, condition=condition)
        )

    async def tasks(
        self, principal: Principal, tenant: str | None = None, *, limit: int | None = None, after: str | None = None
    ) -> list[Document]:
        """List the visible tasks, with versions, aliases and residency; a page never splits tasks of one name.

        Args:
            principal: the caller.
            tenant: owner of the tasks.
            limit: maximum number of tasks (default: all).
            after: name after which the page starts.
        """
        holder = self._reader(principal, tenant)
        found: list[Document] = []
        async with self._lists.turn(principal.tenant):
            models = page(await self._visible(holder, after), limit)
            await in_slices(models, lambda model: found.append(self._document(model)))
        return found

    def task(self, principal: Principal, name: str, tenant: str | None = None) -> Document:
        """Return one task."""
        return self._document(self._models.model(self._reader(principal, tenant), name))

    async def point(
        self,
        principal: Principal,
        name: str,
        alias: str,
        version: str,
        tenant: str | None = None,
        expected: str | None = None,
        condition: Condition = ALWAYS,
    ) -> Document:
        """Point an alias at a version; with `expected`, only if that is its current version."""
        self._change(principal)
        return self._shown(await self._management.point(principal, name, alias, version, tenant, expected, condition))

    async def rollback(
        self,
        principal: Principal,
        name: str,
        alias: str,
        tenant: str | None = None,
        expected: str | None = None,
        condition: Condition = ALWAYS,
    ) -> Document:
        """Point an alias back at its previous version, with `expected` as for `point`."""
        self._change(principal)
        return self._shown(await self._management.rollback(principal, name, alias, tenant, expected, condition))

    async def history(
        self, principal: Principal, name: str, alias: str, limit: int = 100, tenant: str | None = None
    ) -> Sequence[Document]:
        """List the versions of an alias as {version, time, key}, the newest first."""
        holder = self._models.model(self._reader(principal, tenant), name).tenant
        found = await self._pools.control.run(self._state.tasks.history, holder, name, alias, max(1, min(limit, 100)))
        shown = holder == principal.tenant or Action.ADMIN in principal.actions  # never another tenant's key id
        return [{"version": str(one.number), "time": one.time, "key": one.by if shown else None} for one in found]

    async def delete(
        self,
        principal: Principal,
        name: str,
        version: str = "",
        tenant: str | None = None,
        condition: Condition = ALWAYS,
    ) -> str | None:
        """Delete a task, or one version without an alias, and return the tag of the task if it is left."""
        self._change(principal)
        self._events.flush()
        left = await self._management.delete(principal, name, version, tenant, condition)
        if left is None:
            self._options.forget(owner_of(principal, tenant), name)
        return None if left is None else left.tag

    async def publish(self, principal: Principal, name: str, tenant: str, condition: Condition = ALWAYS) -> Document:
        """Share a tenant's task with all tenants; needs ADMIN."""
        self._change(principal, Action.ADMIN)
        return self._shown(await self._management.publish(principal, name, tenant, condition))

    async def pin(self, principal: Principal, name: str, *, folded: bool, tenant: str | None = None) -> Document:
        """Pin a task's current version on the device, or in a folded session."""
        self._change(principal)
        await self._management.pin(principal, name, folded=folded, tenant=tenant)
        return self.task(principal, name, tenant)

    async def unpin(self, principal: Principal, name: str, tenant: str | None = None) -> None:
        """Unpin a task."""
        self._change(principal)
        await self._management.unpin(principal, name, tenant)

    def _change(self, principal: Principal, action: Action = Action.DEPLOY) -> None:
        allow(principal, action)
        self._changes.spend(principal.key)

    def _model(self, principal: Principal, name: str, version: str) -> tuple[Model, str | None]:
        allow(principal, Action.READ)
        model, component = self.components.split(name)
        return self._models.model(principal.tenant, model, version), component

    def _reader(self, principal: Principal, tenant: str | None) -> str:
        allow(principal, Action.READ)
        if tenant is None or tenant == principal.tenant:
            return principal.tenant
        allow(principal, Action.ADMIN)
        return SHARED if tenant == "shared" else tenant

    def _shown(self, task: TaskRecord) -> Document:
        return self._document(self._models.model(task.tenant, task.name))

    async def _visible(self, tenant: str, after: str | None = None) -> Iterator[Model]:
        records = await self._pools.changes.run_for(tenant, self._models.registered, tenant)
        return self._models.listed(records, after)

    def _document(self, model: Model) -> Document:
        residency = self._runtime.residency(target.key for target in model.versions.values())
        return {
            "name": model.name,
            "tenant": model.tenant or None,
            "aliases": dict(model.aliases),
            "versions": [
                {"version": number, "digest": target.digest, "tier": residency.get(target.key, "device")}
                for number, target in model.versions.items()
            ],
            "ready": self._ready and self._models.is_ready(model),
            "pin": self._state.placements.now.pinned.get((model.tenant, model.name)),
            "etag": model.tag,
        }
