"""Changes of tasks: register, point, pin, delete; each is durable before it is acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import AdapterError, Conflict, NotFound, ProtocolError, RunError, TpeftError, UnknownTask
from tpeft_deploy.runtime import Runtime, Source
from tpeft_deploy.runtime.server.isolation.outcomes import Upload
from tpeft_deploy.runtime.server.isolation.pool import Reader
from tpeft_deploy.runtime.server.operations.models import Models
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.registry import (
    ALWAYS,
    CURRENT,
    Condition,
    PinRecord,
    State,
    TaskRecord,
    VersionRecord,
)
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.telemetry.statistics import Statistics
from tpeft_deploy.runtime.server.tenancy.access import SHARED, Action, Principal, allow
from tpeft_deploy.runtime.server.tenancy.tenant_pins import TenantPins
from tpeft_deploy.runtime.server.v2.messages import ServedVersion, UploadPart

__all__ = ["Management", "owner_of"]

_log = logging.getLogger("tpeft_deploy.server")


class Management:
    """Registers, changes, pins and deletes tasks.

    Args:
        runtime: the runtime.
        models: models visible to tenants.
        state: the registry.
        statistics: statistics, dropped with their task.
        admit: raises for an adapter that cannot be served; blocks.
        reader: parser of uploads.
        max_upload_bytes: maximum size of one upload, all files together.
        pins: pinned versions of tenants.
        pools: threads for blocking work.
    """

    def __init__(
        self,
        runtime: Runtime,
        models: Models,
        state: State,
        statistics: Statistics,
        admit: Callable[[VersionRecord, Adapter], None],
        reader: Reader,
        *,
        max_upload_bytes: int,
        pins: TenantPins,
        pools: Pools,
    ) -> None:
        self.pins = pins
        self._pools = pools
        self._runtime = runtime
        self._models = models
        self._state = state
        self._statistics = statistics
        self._admit = admit
        self._reader = reader
        self._max_upload_bytes = max_upload_bytes
        self._pinned: tuple[PinRecord, ...] = ()  # those that the runtime has, but for what other servers changed since
        self._following = threading.Lock()

    def announce(self, records: list[VersionRecord]) -> None:
        """Register versions with the runtime, without reading them."""
        read = self._state.tasks.read
        self._runtime.register({record.key: Source(record.digest, partial(read, record)) for record in records})

    def follow(self) -> None:
        """Serve what is registered, and take over what other servers change from now on."""
        self._state.tasks.follow(self.announce, self._forget)
        self.restore()
        if self._state.shared:
            self._state.on_change = self._placed

    async def register(
        self,
        principal: Principal,
        name: str,
        parts: AsyncIterator[UploadPart],
        *,
        alias: str = CURRENT,
        tenant: str | None = None,
        keep_equal: bool = False,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Register an upload as a new version, checked and ready when this returns.

        Args:
            principal: the caller.
            name: name of the task.
            parts: files of the upload.
            alias: alias that points at the version afterwards.
            tenant: owner of the task (default: the caller's tenant).
            keep_equal: whether to make no new version if the current one has the same content.
            condition: condition that the task has to meet.
        """
        owner = owner_of(principal, tenant)
        self._check_free(name)
        self._reader.check_room(principal.tenant)
        run = partial(self._pools.uploads.run_for, principal.tenant)
        async with self._state.tasks.staging(self._max_upload_bytes, run) as staged:
            async for part, stream in parts:
                await staged.write(part, stream)
            upload = await self._reader.read(principal.tenant, staged.directory, f"the upload for task {name!r}")
            if keep_equal and self._is_current(owner, name, upload):
                return self.task(owner, name)
            # Shielded, so that a disconnect never leaves a half-registered version.
            await asyncio.shield(
                self._pools.uploads.run_for(
                    principal.tenant, self._add, owner, name, upload, alias, principal.key, condition
                )
            )
        return self.task(owner, name)

    async def point(
        self,
        principal: Principal,
        name: str,
        alias: str,
        version: str,
        tenant: str | None = None,
        expected: str | None = None,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Point an alias at a version."""
        owner = owner_of(principal, tenant)
        point = partial(self._state.tasks.point, by=principal.key, expected=expected, condition=condition)
        return await self._pools.changes.run_for(owner, point, owner, name, alias, version)

    async def rollback(
        self,
        principal: Principal,
        name: str,
        alias: str,
        tenant: str | None = None,
        expected: str | None = None,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Point an alias back at its previous version."""
        owner = owner_of(principal, tenant)
        rollback = partial(self._state.tasks.rollback, by=principal.key, expected=expected, condition=condition)
        return await self._pools.changes.run_for(owner, rollback, owner, name, alias)

    async def delete(
        self,
        principal: Principal,
        name: str,
        version: str = "",
        tenant: str | None = None,
        condition: Condition = ALWAYS,
    ) -> TaskRecord | None:
        """Delete a task, or one version without an alias; in-flight requests finish.

        Returns:
            The task after one version was deleted; None after the whole task was.
        """
        owner = owner_of(principal, tenant)
        if version and not (version.isascii() and version.isdigit() and len(version) < 10):
            raise ProtocolError(f"delete version {version!r} of task {name!r}", expected="a number", got="another name")
        left = await asyncio.shield(
            self._pools.changes.run_for(owner, self._delete, owner, name, version, principal.key, condition)
        )
        if not version:
            self._statistics.drop(owner, name)
        return left

    async def publish(self, principal: Principal, name: str, tenant: str, condition: Condition = ALWAYS) -> TaskRecord:
        """Share a tenant's task with all tenants."""
        allow(principal, Action.ADMIN)
        self._check_free(name)
        published = await self._pools.changes.run(
            self._state.tasks.publish,
            tenant,
            name,
            lambda task: self.announce(list(task.versions.values())),
            by=principal.key,
            condition=condition,
        )
        self._runtime.forget(replace(record, tenant=tenant).key for record in published.versions.values())
        self._statistics.drop(tenant, name)
        return published

    async def pin(self, principal: Principal, name: str, *, folded: bool, tenant: str | None = None) -> None:
        """Pin a task's current version on the device, or in a folded session."""
        owner = owner_of(principal, tenant)
        target = self._models.target(owner, name)
        self._check_own(owner, target.tenant, name)
        refused = None
        try:
            await self.pins.add(owner, name, target.key, folded=folded)
        except (AdapterError, RunError) as error:
            if not folded or (not isinstance(error, AdapterError) and type(error) is not RunError):
                raise
            refused = Conflict(f"fold task {name!r}", problem=error.said, fix="It is pinned without that.")
        pin = PinRecord(target.tenant, name, target.version, folded and refused is None)
        await asyncio.shield(self._pools.changes.run_for(owner, self._keep, pin, target.key, principal.key))
        if refused is not None:
            raise refused

    async def unpin(self, principal: Principal, name: str, tenant: str | None = None) -> None:
        """Unpin a task."""
        owner = owner_of(principal, tenant)
        target = self._models.target(owner, name)
        self._check_own(owner, target.tenant, name)
        await asyncio.shield(self._pools.changes.run_for(owner, self._unpin, target, principal.key))

    def restore(self) -> None:
        """Restore the pins of the previous run; blocks, except for folded sessions."""
        self._pinned = self._state.placements.now.pins
        folded = [pin for pin in self._pinned if not self._restore(pin, folded=False) and pin.folded]
        if folded:
            threading.Thread(target=self._fold_again, args=[folded], name="tpeft-folds", daemon=True).start()

    def _forget(self, records: list[VersionRecord]) -> None:
        with contextlib.suppress(UnknownTask):
            self._runtime.forget(record.key for record in records)
        for tenant, name in {(record.tenant, record.task) for record in records}:
            if self._state.tasks.snapshot().own(tenant, name) is None:
                self._statistics.drop(tenant, name)

    def _placed(self) -> None:
        """Pin and unpin what another server has, in a thread: bringing an adapter takes time."""
        if self._state.placements.now.pins != self._pinned:
            threading.Thread(target=self._follow_pins, name="tpeft-pins", daemon=True).start()

    def _follow_pins(self) -> None:
        with self._following:
            while (wanted := self._state.placements.now.pins) != self._pinned:
                before, self._pinned = self._pinned, wanted
                known = self._runtime.pins()
                for pin in before:
                    if pin not in wanted:
                        with contextlib.suppress(UnknownTask, NotFound):  # deleted, and its pin with it
                            self._runtime.unpin(self._models.key(pin.tenant, pin.task, pin.version))
                for pin in wanted:
                    with contextlib.suppress(NotFound):
                        if known.get(self._models.key(pin.tenant, pin.task, pin.version)) != pin.folded:
                            self._restore(pin, folded=pin.folded)

    def task(self, tenant: str, name: str) -> TaskRecord:
        """Return a task visible to a tenant.

        Raises:
            NotFound: no visible task has that name.
        """
        return self._state.tasks.snapshot().task(tenant, name)

    def _is_current(self, tenant: str, name: str, upload: Upload) -> bool:
        own = self._state.tasks.snapshot().own(tenant, name)
        return own is not None and own.version("").digest == Blobs.digest(upload.data)

    def _add(self, tenant: str, name: str, upload: Upload, alias: str, by: str, condition: Condition) -> None:
        self._state.tasks.add(
            tenant,
            name,
            upload.adapter,
            self._admit,
            by=by,
            alias=alias,
            data=upload.data,
            condition=condition,
            withdraw=lambda record: self._runtime.forget([record.key]),
        )

    def _keep(self, pin: PinRecord, key: str, by: str) -> None:
        try:
            with self._following:  # another server may remove it before this one follows
                self._state.placements.pin(pin, by=by)
                self._pinned = (*(own for own in self._pinned if not _same(own, pin)), pin)
        except BaseException:
            with contextlib.suppress(UnknownTask):
                self._runtime.unpin(key)
            raise

    def _unpin(self, target: ServedVersion, by: str) -> None:
        pinned = self._state.placements.pins(target.tenant, target.task)
        with self._following:
            self._state.placements.unpin(target.tenant, target.task, by=by)
            own = (target.tenant, target.task)
            self._pinned = tuple(pin for pin in self._pinned if (pin.tenant, pin.task) != own)
        for key in {target.key, *(self._models.key(pin.tenant, pin.task, pin.version) for pin in pinned)}:
            with contextlib.suppress(UnknownTask):  # deleted, and its pin with it
                self._runtime.unpin(key)

    def _fold_again(self, pins: list[PinRecord]) -> None:
        for pin in pins:
            self._restore(pin, folded=True)

    def _restore(self, pin: PinRecord, *, folded: bool) -> bool:
        """Pin a version again; return whether it failed."""
        try:
            self._runtime.pin(self._models.key(pin.tenant, pin.task, pin.version), folded=folded)
        except (UnknownTask, NotFound):
            self._state.placements.forget(pin)
        except TpeftError as error:
            _log.warning("cannot pin version %s of task %r again: %s", pin.version, pin.task, error)
        else:
            return False
        return True

    def _delete(self, tenant: str, name: str, version: str, by: str, condition: Condition) -> TaskRecord | None:
        left, tasks = None, self._state.tasks
        if version:
            record, left = tasks.remove_version(tenant, name, int(version), by=by, condition=condition)
            gone = [record]
        else:
            gone = tasks.remove(tenant, name, by=by, condition=condition)
        self._runtime.forget(record.key for record in gone)
        return left

    def _check_free(self, name: str) -> None:
        if name in self._models.reserved:
            raise Conflict(
                f"register task {name!r}",
                expected="a name that no model of the bundle has",
                got="one that a model of the bundle has",
                fix="Choose another name.",
            )

    def _check_own(self, tenant: str, found: str, name: str) -> None:
        if found != tenant:
            raise Conflict(f"pin task {name!r}", expected="a task that the tenant owns", got="a shared one")


def _same(pin: PinRecord, other: PinRecord) -> bool:
    return (pin.tenant, pin.task, pin.version) == (other.tenant, other.task, other.version)


def owner_of(principal: Principal, tenant: str | None) -> str:
    """Return the owner of the changed task: the principal's tenant, or any for an admin ("shared" for shared tasks).

    Raises:
        Forbidden: the role does not allow the change.
    """
    allow(principal, Action.DEPLOY)
    if tenant is None or tenant == principal.tenant:
        return principal.tenant
    allow(principal, Action.ADMIN)
    return SHARED if tenant == "shared" else tenant
