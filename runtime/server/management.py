"""Changes: registering, pointing, pinning, deleting; keys and tenants.  Each is done before it is acknowledged."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

from tpeft_deploy.errors import NotFound, ProtocolError, Unsupported
from tpeft_deploy.runtime import Runtime, Source
from tpeft_deploy.runtime.server.access import SHARED, Action, Principal, Role, allow
from tpeft_deploy.runtime.server.core import Document, Part
from tpeft_deploy.runtime.server.messages import Parameter
from tpeft_deploy.runtime.server.models import Model, Models
from tpeft_deploy.runtime.server.quotas import Quota
from tpeft_deploy.runtime.server.registry import CURRENT, State, VersionRecord
from tpeft_deploy.runtime.server.statistics import Statistics

__all__ = ["Management"]

_QUOTA = ("requests_per_s", "rows_per_s", "queue_share", "adapters", "bytes", "weight")


class Management:
    """Changes what is served, and who may call it.

    Args:
        runtime: what serves.
        models: what tenants see.
        state: the registry.
        statistics: forgotten with what they count.
        admit: refuses an upload that is not fit to serve; blocks.
        max_upload_bytes: of one upload, all files together.
    """

    def __init__(
        self,
        runtime: Runtime,
        models: Models,
        state: State,
        statistics: Statistics,
        admit: Callable[[VersionRecord, Adapter], None],
        *,
        max_upload_bytes: int,
    ) -> None:
        self._runtime = runtime
        self._models = models
        self._state = state
        self._statistics = statistics
        self._admit = admit
        self._max_upload_bytes = max_upload_bytes

    async def register(
        self,
        principal: Principal,
        name: str,
        parts: AsyncIterator[Part],
        *,
        alias: str = CURRENT,
        tenant: str | None = None,
    ) -> VersionRecord:
        """A new version of a task from an upload, checked and ready when this returns."""
        owner = _owner(principal, tenant)
        if name in self._models.reserved:
            raise Conflict(f"register task {name!r}", expected="a name of its own", got="the name of a shared model")
        async with self._state.tasks.staging(self._max_upload_bytes) as staged:
            async for file, stream in parts:
                await staged.write(file, stream)
            return await asyncio.to_thread(self._add, owner, name, staged, alias, principal)
