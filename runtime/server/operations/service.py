"""The server's operations, as REST and gRPC call them: who may do it, then the part that does it."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tpeft_deploy
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import Conflict, ProtocolError, ServerError, TooLarge, Unauthenticated, Unsupported
from tpeft_deploy.runtime import Limits, Runtime
from tpeft_deploy.runtime.server.isolation.pool import Direct, Reader
from tpeft_deploy.runtime.server.operations.admission import Admission
from tpeft_deploy.runtime.server.operations.inference import Inference
from tpeft_deploy.runtime.server.operations.models import Model, Models
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.operations.slices import Turns, in_slices
from tpeft_deploy.runtime.server.operations.tasks import Management, owner
from tpeft_deploy.runtime.server.registry import CURRENT, KeyRecord, State, TaskRecord, TenantRecord
from tpeft_deploy.runtime.server.telemetry.inference_events import Observed, Observers
from tpeft_deploy.runtime.server.telemetry.statistics import Statistics
from tpeft_deploy.runtime.server.tenancy.access import LOCAL, SHARED, Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.change_rate import ChangeRate
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair
from tpeft_deploy.runtime.server.tenancy.pins import Pins
from tpeft_deploy.runtime.server.tenancy.quotas import Meter, Quota, queue_shares
from tpeft_deploy.runtime.server.v2 import metadata
from tpeft_deploy.runtime.server.v2.largest_body import largest_body
from tpeft_deploy.runtime.server.v2.messages import Encoded, LoadParameter, Parameter
from tpeft_deploy.runtime.server.v2.operations import Document, Part
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["Options", "Service", "order_of"]

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")
_BASE64 = 1 << 18  # of text that is decoded at once; whole groups of four


@dataclass(frozen=True)
class Options:
    """What the operations need to know of the configuration.

    Attributes:
        limits: of batching.
        authenticate: whether keys are asked for.
        max_upload_bytes: of one upload.
        reader: reads the files of uploads; in this process and without limits by default.
        max_folded: pinned versions with sessions of their own, of all tenants together.
        metrics: renders the metrics; blocks.
        metrics_for_all: whether any key may read them.
        changes_per_s: changes a second that one key may make.
        audit_days: age of the entries that the audit log keeps.
        audit_rows: number of them.
        observe: told of each inference, on the event loop, soon after it.
        forget: told of tasks that are gone: tenant and name.
        pools: threads for what blocks.
    """

    limits: Limits = field(default_factory=Limits)
    authenticate: bool = True
    max_upload_bytes: int = 2**30
    reader: Reader | None = None
    max_folded: int = 8
    metrics: Callable[[], bytes] = lambda: b""
    metrics_for_all: bool = False
    changes_per_s: float | None = None
    audit_days: float | None = None
    audit_rows: int | None = None
    observe: Callable[[Observed], None] = lambda _: None
    forget: Callable[[str, str], None] = lambda _tenant, _task: None
    pools: Pools = field(default_factory=Pools)


class Service:
    """One bundle served to many tenants; implements `core.Core`.

    Args:
        runtime: serves the bundle, with `order` as its queue's order.
        bundle: what is served.
        state: the registry.
        order: of the runtime's queue.
        options: the rest.

    Attributes:
        largest_body: bytes of the largest request that the model's inputs can fill; None where they have no bound.
    """

    def __init__(
        self, runtime: Runtime, bundle: Bundle, state: State, order: Fair[Any], options: Options | None = None
    ) -> None:
        self._options = options or Options()
        pools = self._pools = self._options.pools
        self._lists = Turns()
        self._manifest = bundle.manifest
        self.largest_body = largest_body(bundle.manifest, self._options.limits.max_request_rows)
        self._runtime = runtime
        self._state = state
        self._order = order
        self._ready = self._accepting = True
        self._meter = Meter(state.tenants.quota)
        self._changes = ChangeRate(self._options.changes_per_s)
        self._statistics = Statistics()
        self._models = Models(bundle, state)
        self._observers = Observers(self._statistics.inference, self._options.observe)
        self._inference = Inference(
            runtime, bundle.manifest, self._models.target, self._meter.spend_rows, self.accepting, self._observers.tell
        )
        self.infer = self._inference.infer  # as it is: what is called most is not handed on
        self._management = Management(
            runtime,
            self._models,
            state,
            self._statistics,
            Admission(bundle, runtime, state.tasks.read).check,
            self._options.reader or Direct(bundle, pools.uploads),
            max_upload_bytes=self._options.max_upload_bytes,
            pins=Pins(runtime, state.tenants.quota, self._options.max_folded, pools.uploads),
            pools=pools,
        )
        self._management.announce(list(state.tasks.snapshot().versions()))
        self._management.restore()

    def live(self) -> bool:
        """Whether the process works at all."""
        return True

    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self._ready and self._state.intact

    def accepting(self) -> bool:
        """Whether inference is taken."""
        return self._accepting

    def drain(self) -> None:
        """Say that requests should be sent elsewhere; those that come all the same are answered."""
        self._ready = False

    def refuse(self) -> None:
        """Take no more inference; what came is answered."""
        self._ready = self._accepting = False

    async def sweep(self, seconds: float) -> None:
        """Remove the files of deleted adapters and old audit entries every so many seconds, until cancelled."""
        days, rows = self._options.audit_days, self._options.audit_rows
        while True:
            await asyncio.sleep(seconds)
            await self._pools.changes.run(self._state.tasks.sweep)
            with contextlib.suppress(ServerError):  # a full disk, which was logged: the next time, then
                await self._pools.changes.run(self._state.audit.sweep, days=days, rows=rows)

    def authenticate(self, authorization: str | None) -> Principal:
        """Who sent `Authorization: Bearer KEY`."""
        if not self._options.authenticate:
            return LOCAL
        if authorization is not None and authorization.startswith("Bearer "):  # as nearly everybody writes it
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
        """Take one inference request from the tenant's quota, if the role allows any."""
        allow(principal, Action.INFER)
        self._meter.spend_request(principal.tenant, time.monotonic())

    def server_metadata(self, principal: Principal) -> Document:
        """Name, version, extensions."""
        allow(principal, Action.READ)
        return {
            "name": "tpeft-deploy",
            "version": tpeft_deploy.__version__,
            "extensions": list(EXTENSIONS),
            "bundle": self._manifest.name,
        }

    def model_metadata(self, principal: Principal, name: str, version: str = "") -> Document:
        """Name, versions, platform, inputs, outputs."""
        model = self._model(principal, name, version)
        return metadata.metadata(self._manifest, name, list(model.versions), mixed=model.mixed)

    def model_config(self, principal: Principal, name: str, version: str = "") -> Document:
        """Triton's ModelConfig as JSON."""
        model = self._model(principal, name, version)
        limits = self._options.limits
        return metadata.config(
            self._manifest,
            name,
            list(model.versions),
            max_rows=limits.max_rows,
            max_delay=limits.max_delay,
            mixed=model.mixed,
        )

    def model_ready(self, principal: Principal, name: str, version: str = "") -> bool:
        """Whether a request for the model would be served."""
        return self._ready and self._models.is_ready(self._model(principal, name, version))

    async def statistics(self, principal: Principal, name: str = "", version: str = "") -> Document:
        """What models have answered so far."""
        if name:
            models = iter([self._model(principal, name, version)])
        else:
            allow(principal, Action.READ)
            models = await self._visible(principal.tenant)
        self._observers.settle()
        asked_by = None if Action.ADMIN in principal.actions else principal.tenant
        found: list[Document] = []

        def show(model: Model) -> None:
            found.extend(
                self._statistics.document(model.tenant, model.name, number, asked_by) for number in model.versions
            )

        async with self._lists.turn(principal.tenant):
            await in_slices(models, show)
        return {"model_stats": found}

    async def index(self, principal: Principal, *, ready: bool = False) -> list[Document]:
        """Models and whether they are ready."""
        allow(principal, Action.READ)
        found: list[Document] = []

        def show(model: Model) -> None:
            is_ready = self._models.is_ready(model)
            if is_ready or not ready:
                state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", "unloaded")
                found.extend(
                    {"name": model.name, "version": number, "state": state, "reason": reason}
                    for number in model.versions
                )

        async with self._lists.turn(principal.tenant):
            await in_slices(await self._visible(principal.tenant), show)
        return found

    async def load(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Make a model ready; with "file:..." parameters, register a new version first."""
        self._change(principal)
        files = {key: value for key, value in parameters.items() if key.startswith("file:")}
        unknown = sorted(set(parameters) - set(files) - {"pin"})
        if "config" in unknown:
            raise Unsupported(
                f"load model {name!r}", problem="a model's configuration follows from its bundle", fix="Send no config."
            )
        if unknown:
            raise ProtocolError(
                f"load model {name!r}",
                expected="parameters 'file:...' and 'pin'",
                got=", ".join(map(quoted, unknown)),
            )
        if files:
            await self._management.register(principal, name, _parts(name, files, self._options.max_upload_bytes))
        model = self._changeable(principal, name)
        await self._pools.changes.run_for(
            principal.tenant, self._state.placements.load, model.tenant, model.name, by=principal.key
        )
        self._models.reload((model.tenant, model.name))
        if not model.mixed and model.name != "base":
            target = self._models.target(principal.tenant, name)
            await asyncio.wrap_future(self._runtime.prefetch([target.key]))
            if parameters.get("pin"):
                await self._management.pin(principal, name, folded=False, tenant=model.tenant or "shared")

    async def unload(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Refuse requests for a model until it is loaded again."""
        self._change(principal)
        unknown = sorted(set(parameters) - {"unload_dependents"})
        if unknown:
            got = ", ".join(map(quoted, unknown))
            raise ProtocolError(f"unload model {name!r}", expected="no parameters but 'unload_dependents'", got=got)
        model = self._changeable(principal, name)
        await self._pools.changes.run_for(
            principal.tenant, self._state.placements.unload, model.tenant, model.name, by=principal.key
        )
        self._models.unload((model.tenant, model.name))
        self._observers.settle()
        self._statistics.drop(model.tenant, model.name)
        self._options.forget(model.tenant, model.name)

    async def register(
        self,
        principal: Principal,
        name: str,
        parts: AsyncIterator[Part],
        *,
        alias: str = CURRENT,
        tenant: str | None = None,
    ) -> Document:
        """A new version of a task from an upload; checked and ready when this returns."""
        self._change(principal)
        return self._shown(await self._management.register(principal, name, parts, alias=alias, tenant=tenant))

    async def tasks(
        self, principal: Principal, tenant: str | None = None, *, limit: int | None = None, after: str | None = None
    ) -> list[Document]:
        """The tasks that the principal sees, or so many of them after a name; a name is never cut in two."""
        whose = self._reader(principal, tenant)
        found: list[Document] = []
        async with self._lists.turn(principal.tenant):
            models = await self._visible(whose, after)
            await in_slices(_page(models, limit), lambda model: found.append(self._document(model)))
        return found

    def task(self, principal: Principal, name: str, tenant: str | None = None) -> Document:
        """One of them."""
        model = self._models.model(self._reader(principal, tenant), name)
        return self._document(model)

    async def point(
        self,
        principal: Principal,
        name: str,
        alias: str,
        version: str,
        tenant: str | None = None,
        expected: str | None = None,
    ) -> Document:
        """Let an alias stand for another version."""
        self._change(principal)
        return self._shown(await self._management.point(principal, name, alias, version, tenant, expected))

    async def rollback(
        self, principal: Principal, name: str, alias: str, tenant: str | None = None, expected: str | None = None
    ) -> Document:
        """Let an alias stand again for what it stood for before."""
        self._change(principal)
        return self._shown(await self._management.rollback(principal, name, alias, tenant, expected))

    async def history(
        self, principal: Principal, name: str, alias: str, limit: int = 100, tenant: str | None = None
    ) -> Sequence[Document]:
        """What an alias stands for and stood for before."""
        whose = self._models.model(self._reader(principal, tenant), name).tenant
        found = await self._pools.control.run(self._state.tasks.history, whose, name, alias, max(1, min(limit, 100)))
        shown = whose == principal.tenant or Action.ADMIN in principal.actions  # keys of others are theirs alone
        return [{"version": str(one.number), "time": one.time, "key": one.by if shown else None} for one in found]

    async def delete(self, principal: Principal, name: str, version: str = "", tenant: str | None = None) -> None:
        """Delete a task, or one version that no alias stands for."""
        self._change(principal)
        self._observers.settle()
        await self._management.delete(principal, name, version, tenant)
        if not version:
            self._options.forget(owner(principal, tenant), name)

    async def publish(self, principal: Principal, name: str, tenant: str) -> Document:
        """Give a tenant's task to all tenants."""
        self._change(principal, Action.ADMIN)
        return self._shown(await self._management.publish(principal, name, tenant))

    async def pin(self, principal: Principal, name: str, *, folded: bool, tenant: str | None = None) -> Document:
        """Keep a task's current version on the device, or in a session of its own."""
        self._change(principal)
        await self._management.pin(principal, name, folded=folded, tenant=tenant)
        return self.task(principal, name, tenant)

    async def unpin(self, principal: Principal, name: str, tenant: str | None = None) -> None:
        """Let it leave the device again."""
        self._change(principal)
        await self._management.unpin(principal, name, tenant)

    async def create_key(
        self, principal: Principal, tenant: str, role: str, expires_in: float | None = None
    ) -> Document:
        """A new key, shown this once."""
        self._change(principal, Action.ADMIN)
        if not self._options.authenticate:  # it would outlive this mode, in which everybody here is an admin
            raise Conflict(
                f"create a key for tenant {quoted(tenant)}",
                problem="this server asks for none",
                fix="Start it without --no-auth, or use tpeft-deploy keys create.",
            )
        expires = None if expires_in is None else time.time() + expires_in
        record, key = await self._pools.control.run(
            self._state.keys.create, tenant, role, by=principal.key, expires=expires
        )
        return {**_key(record), "key": key}

    async def keys(self, principal: Principal, tenant: str | None = None) -> list[Document]:
        """Keys without their secrets."""
        allow(principal, Action.ADMIN)
        return [_key(record) for record in self._state.keys.list(tenant)]

    async def revoke_key(self, principal: Principal, id: str) -> None:
        """Refuse a key from now on."""
        allow(principal, Action.ADMIN)
        await self._pools.control.run(self._state.keys.revoke, id, by=principal.key)

    async def tenants(self, principal: Principal) -> list[Document]:
        """Tenants, their quotas and what they use."""
        allow(principal, Action.ADMIN)
        return [self._tenant(record) for record in self._state.tenants.list()]

    async def set_tenant(self, principal: Principal, tenant: str, quota: Mapping[str, float | None]) -> Document:
        """Set a tenant's quotas and weight: None is no limit, what is left out as for tenants without a quota."""
        self._change(principal, Action.ADMIN)
        known = set(asdict(Quota()))
        if not set(quota) <= known:
            raise ProtocolError(
                f"set the quota of tenant {tenant!r}",
                expected=f"fields among {', '.join(sorted(known))}",
                got=", ".join(sorted(set(quota) - known)),
            )
        own = replace(self._state.tenants.default, **quota)  # type: ignore[arg-type]  # it checks its fields itself
        return self._tenant(await self._pools.control.run(self._state.tenants.put, tenant, own, by=principal.key))

    async def audit(self, principal: Principal, limit: int = 100, before: int | None = None) -> Sequence[Document]:
        """The newest changes first."""
        allow(principal, Action.ADMIN)
        found = await self._pools.control.run(self._state.audit.list, max(1, min(limit, 1000)), before)
        return [asdict(record) for record in found]

    async def metrics(self, principal: Principal) -> bytes:
        """In the text format of Prometheus."""
        allow(principal, Action.READ if self._options.metrics_for_all else Action.ADMIN)
        self._observers.settle()
        return await self._pools.control.run(self._options.metrics)

    def _change(self, principal: Principal, action: Action = Action.DEPLOY) -> None:
        allow(principal, action)
        self._changes.spend(principal.key)

    def _model(self, principal: Principal, name: str, version: str) -> Model:
        allow(principal, Action.READ)
        return self._models.model(principal.tenant, name, version)

    def _changeable(self, principal: Principal, name: str) -> Model:
        model = self._models.model(principal.tenant, name)
        if model.tenant != principal.tenant:
            allow(principal, Action.ADMIN)  # what all tenants share
        return model

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
        }

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
                **self._management.pins.used(record.name),
            },
        }


def _page(models: Iterator[Model], limit: int | None) -> Iterator[Model]:
    last = None
    for count, model in enumerate(models):
        if limit is not None and count >= limit and model.name != last:
            return
        last = model.name
        yield model


def order_of(state: State, limits: Limits) -> Fair[Any]:
    """The order of a queue with such limits: fair by the tenants' weights, each within its share."""
    return Fair(
        lambda tenant: state.tenants.quota(tenant).weight, queue_shares(state.tenants.quota, limits.max_queue_rows)
    )


def _key(record: KeyRecord) -> Document:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "role": record.role.value,
        "created": record.created,
        "expires": record.expires,
        "revoked": record.revoked,
    }


async def _parts(name: str, files: Mapping[str, LoadParameter], limit: int) -> AsyncIterator[Part]:
    """The files of Triton's load call; told apart by how their names end, which go no further."""
    for key, value in files.items():
        part = "config" if key.endswith("adapter_config.json") else "weights"
        if not key.endswith((".safetensors", "adapter_config.json")):
            raise ProtocolError(
                f"load model {name!r}", expected="files *.safetensors and adapter_config.json", got=repr(key[:100])
            )
        doing = f"load model {name!r}, {key[:100]!r}"
        yield part, _bytes(value) if isinstance(value, bytes) else _decoded(doing, value, limit)


async def _bytes(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _decoded(doing: str, value: Parameter | Encoded, limit: int) -> AsyncIterator[bytes]:
    """Base64 in pieces, so that no second copy of a file is held."""
    if not isinstance(value, str | Encoded):
        raise ProtocolError(doing, expected="base64", got=type(value).__name__)
    try:
        text = value.text if isinstance(value, Encoded) else memoryview(value.encode("ascii"))
        if len(text) > 4 * limit // 3 + 4:
            raise TooLarge(doing, expected=f"at most {limit:,} bytes", got="more")
        for at in range(0, len(text), _BASE64):
            data = binascii.a2b_base64(text[at : at + _BASE64], strict_mode=True)
            if len(data) < _BASE64 // 4 * 3 and at + _BASE64 < len(text):
                raise ProtocolError(doing, expected="base64", got="padding before its end")
            yield data
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(doing, expected="base64", got=str(error)) from None
