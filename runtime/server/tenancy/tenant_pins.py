"""Pinned versions, within the quotas of tenants."""

from __future__ import annotations

from collections.abc import Callable

from tpeft_deploy.errors import CapacityError, Conflict, QuotaExceeded
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.server.operations.pools import Workers
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

__all__ = ["TenantPins"]


class TenantPins:
    """Versions pinned on the device; not thread-safe, used on one event loop.

    Args:
        runtime: runtime that holds the versions.
        quota: returns the current quota of a tenant.
        max_folded: maximum number of versions with a folded session, over all tenants.
        workers: threads for loading and folding.
    """

    def __init__(self, runtime: Runtime, quota: Callable[[str], Quota], max_folded: int, workers: Workers) -> None:
        self._runtime = runtime
        self._quota = quota
        self._max_folded = max_folded
        self._workers = workers
        self._coming: dict[str, bool] = {}  # being pinned, possibly not yet known to the runtime

    def used(self, tenant: str) -> dict[str, int]:
        """Return the number of pinned and of folded versions of a tenant."""
        own = [folded for key, folded in self._known().items() if key.startswith(f"{tenant}/")]
        return {"pins": len(own), "folded": sum(own)}

    async def add(self, tenant: str, name: str, key: str, *, folded: bool) -> None:
        """Pin a version.

        Args:
            tenant: owner of the version; shared versions have no quota, as only admins pin them.
            name: name of the task.
            key: key of the version in the runtime.
            folded: whether to also create a folded session.

        Raises:
            QuotaExceeded: the tenant's quota is used up.
            Conflict: no room for pins on the device, or for folded sessions.
            AdapterError, RunError: the version cannot be loaded or folded.
        """
        self._check(tenant, name, key, folded)
        self._coming[key] = folded
        try:
            await self._workers.run_for(tenant, self._runtime.pin, key, folded=folded)
        except CapacityError as error:
            raise Conflict(f"pin task {name!r}", problem=str(error), fix="Unpin others first.") from error
        finally:
            self._coming.pop(key, None)

    def _known(self) -> dict[str, bool]:
        return {**self._runtime.pins(), **self._coming}

    def _check(self, tenant: str, name: str, key: str, folded: bool) -> None:
        others = {other: is_folded for other, is_folded in self._known().items() if other != key}
        own = [is_folded for other, is_folded in others.items() if other.startswith(f"{tenant}/")]
        quota = Quota() if tenant == SHARED else self._quota(tenant)
        for what, used, most in (("pinned", len(own), quota.pins), ("folded", sum(own), quota.folded)):
            if most is not None and used >= most and (folded or what == "pinned"):
                raise QuotaExceeded(
                    f"pin task {name!r} of tenant {tenant!r}",
                    expected=f"at most {most} versions {what}",
                    got=f"{used} already",
                    fix="Unpin others first.",
                )
        if folded and sum(others.values()) >= self._max_folded:
            raise Conflict(
                f"fold task {name!r}",
                expected=f"at most {self._max_folded} folded versions on this server",
                got="as many already",
                fix="Pin it without folding.",
            )
