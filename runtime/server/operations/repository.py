"""Loading and unloading of models, from uploads or from adapters that are registered already."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import InputError, NotFound
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.server.operations.load_parameters import check_unload_parameters, files_of, parts_of
from tpeft_deploy.runtime.server.operations.models import Model, Models
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.operations.tasks import Management
from tpeft_deploy.runtime.server.registry import State
from tpeft_deploy.runtime.server.tenancy.access import SHARED, Action, Principal, allow
from tpeft_deploy.runtime.server.v2.messages import LoadParameter, ServedVersion, UploadPart

__all__ = ["ModelRepository"]

_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


class ModelRepository:
    """Loads and unloads models; a model that is unloaded stays registered.

    Args:
        runtime: the runtime.
        bundle: the served bundle.
        state: the registry.
        models: models visible to tenants.
        management: changes of tasks.
        change: checks that a principal may change something now, and counts it.
        max_upload_bytes: maximum size of one upload, all files together.
        pools: threads for blocking work.
    """

    def __init__(
        self,
        runtime: Runtime,
        bundle: Bundle,
        state: State,
        models: Models,
        management: Management,
        change: Callable[[Principal], None],
        max_upload_bytes: int,
        pools: Pools,
    ) -> None:
        self._runtime = runtime
        self._bundle = bundle
        self._state = state
        self._models = models
        self._management = management
        self._change = change
        self._max_upload_bytes = max_upload_bytes
        self._pools = pools

    async def load(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Load a model; with "file:..." parameters, register a new version first."""
        self._change(principal)
        files = files_of(name, parameters)
        if files:
            await self._management.register(principal, name, parts_of(name, files, self._max_upload_bytes))
        model = await self._load(principal, name)
        if parameters.get("pin") and not _is_base(model):
            await self._management.pin(principal, name, folded=False, tenant=model.tenant or "shared")

    async def load_upload(self, principal: Principal, name: str, parts: AsyncIterator[UploadPart]) -> None:
        """Load a model with an upload; a model that has this adapter already gets no new version.

        The rate of changes does not apply: a caller that restarts loads everything again.
        """
        allow(principal, Action.DEPLOY)
        await self._management.register(principal, name, parts, keep_equal=True)
        await self._load(principal, name)

    async def load_from(self, principal: Principal, name: str, source: str, *, replace: bool = False) -> None:
        """Load a model with an adapter that is registered already.

        Args:
            principal: the caller.
            name: name of the model; registered as a task of the tenant if the adapter is that of another one.
            source: a task, `TASK@VERSION`, or the digest of a version.
            replace: whether the adapter may replace another one of a model that is loaded.

        Raises:
            InputError: the source is a path, or the model is loaded already.
            NotFound: the tenant sees no such source.
        """
        self._change(principal)
        doing = f"load LoRA adapter {name[:200]!r}"
        found = await self._pools.changes.run_for(principal.tenant, self._source, principal.tenant, doing, source)
        try:
            current = self._models.version(principal.tenant, name)
        except NotFound:
            current = None
        if current is not None and not replace and self._models.is_ready(self._models.model(principal.tenant, name)):
            raise InputError(doing, problem="it has already been loaded", fix="Set 'load_inplace' to replace it.")
        if current is None or current.digest != found.digest:
            await self._management.register(principal, name, self._parts(principal.tenant, found))
        await self._load(principal, name)

    async def unload(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> Model:
        """Unload a model, and return it: requests for it are refused until it is loaded again."""
        self._change(principal)
        check_unload_parameters(name, parameters)
        model = self._changeable(principal, name)
        await self._pools.changes.run_for(
            principal.tenant, self._state.placements.unload, model.tenant, model.name, by=principal.key
        )
        return model

    async def _load(self, principal: Principal, name: str) -> Model:
        model = self._changeable(principal, name)
        await self._pools.changes.run_for(
            principal.tenant, self._state.placements.load, model.tenant, model.name, by=principal.key
        )
        if not _is_base(model):
            target = self._models.target(principal.tenant, name)
            await asyncio.wrap_future(self._runtime.prefetch([target.key]))
        return model

    def _changeable(self, principal: Principal, name: str) -> Model:
        model = self._models.model(principal.tenant, name)
        if model.tenant != principal.tenant:
            allow(principal, Action.ADMIN)  # shared by all tenants
        return model

    def _source(self, tenant: str, doing: str, source: str) -> ServedVersion:
        """Resolve a source among the versions that a tenant sees, loaded or not."""
        digest = _DIGEST.fullmatch(source)
        if digest is not None:
            for model in self._models.listed(self._models.registered(tenant)):
                for own in model.versions.values():
                    if own.digest == digest[1]:
                        return own
            raise NotFound(doing, problem="no registered version has that digest")
        name, _, version = source.partition("@")
        if not is_name(name):
            raise InputError(
                doing,
                expected="a lora_path that is a task, TASK@VERSION or the digest of a version",
                got=f"{source[:200]!r}",
                fix="Upload the adapter first: POST /v2/registry/tasks/TASK/versions.",
            )
        return self._models.version(tenant, name, version)

    async def _parts(self, tenant: str, version: ServedVersion) -> AsyncIterator[UploadPart]:
        """Yield the file of a version as an upload, so that it is checked as one."""
        data = await self._pools.uploads.run_for(tenant, self._file, version)

        async def pieces() -> AsyncIterator[bytes]:
            yield data

        yield "weights", pieces()

    def _file(self, version: ServedVersion) -> bytes:
        if version.tenant == SHARED and version.task in self._bundle.tasks:
            return self._bundle.adapter(version.task).to_bytes()
        tasks = self._state.tasks
        return tasks.read(tasks.snapshot().find(version.tenant, version.task, version.version)).to_bytes()


def _is_base(model: Model) -> bool:
    return model.mixed or model.name == BASE_TASK
