"""One request of `infer`: its versions are held while it waits, and joined with those of others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import CapacityError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.loader import Holder
from tpeft_deploy.runtime.adapters.residency import Tiers
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.batching.calls import Answered
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.batching.worker import Batcher
from tpeft_deploy.tucker import Array

__all__ = ["Answering"]


class Answering:
    """Sends requests to the batcher with their versions on the device.

    Args:
        manifest: manifest of the bundle.
        tiers: residency of the versions.
        holder: waits for them.
        batcher: joins and runs.
    """

    def __init__(self, manifest: Manifest, tiers: Tiers, holder: Holder, batcher: Batcher) -> None:
        self._manifest = manifest
        self._tiers = tiers
        self._holder = holder
        self._batcher = batcher

    async def infer(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version | None],
        *,
        apart: bool,
        outputs: Sequence[Port],
        timeout: float | None,
        tenant: str,
        priority: int,
        timing: Timing | None,
        since: float | None = None,
    ) -> Answered:
        """Answer a request.

        Args:
            inputs: as `requests.check_inputs` gives them.
            versions: one for all rows, or, with `apart`, one a row; None is the base.
            apart: as `Joiner.cut`.
            outputs: that are asked for.
            timeout: seconds until the answer is of no use.
            tenant: tenant that the order of the queue charges.
            priority: as `batching.Request`.
            timing: is told when the run began and ended.
            since: when the timeout began, by `time.monotonic`; by default now.

        Raises:
            AdapterError, BundleError, CapacityError: a version cannot be brought to the device.
            TooLarge, QueueFull, DeadlineExceeded: as the batcher.
        """
        if len(versions) == 1:
            held = [versions[0]] if versions[0] is not None else []
        else:
            held = [version for version in dict.fromkeys(versions) if version is not None]
        began = time.monotonic() if since is None else since
        if held and not self._tiers.take_resident(held, new=True):
            self._batcher.check(inputs)  # no adapter is brought, and none leaves, for what cannot be answered
            try:
                left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
                await self._holder.take(held, left, tenant)
            except CapacityError:
                if len(held) < 2:
                    raise
                return await self._in_parts(inputs, versions, held, outputs, timeout, began, tenant, priority, timing)
        try:
            one: Version | str | None = None
            each: list[Version | str] | None = None
            if apart:
                each = [BASE_TASK if version is None else version for version in versions]
            else:
                one = BASE_TASK if versions[0] is None else versions[0]
            return await self._batcher.infer(
                inputs,
                one,
                tasks=each,
                outputs=outputs,
                timeout=timeout,
                since=began,
                tenant=tenant,
                priority=priority,
                timing=timing,
            )
        finally:
            if held:
                self._tiers.give_back(held)

    async def _in_parts(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version | None],
        held: Sequence[Version],
        outputs: Sequence[Port],
        timeout: float | None,
        since: float,
        tenant: str,
        priority: int,
        timing: Timing | None,
    ) -> Answered:
        """Half of the versions after the other, as they do not fit on the device together."""
        first = set(held[: (len(held) + 1) // 2])
        chosen = np.array([version in first for version in versions])
        gathered = requests.Gathered(outputs, len(versions))
        for part in (chosen, ~chosen):
            places = np.flatnonzero(part)
            answer = await self.infer(
                requests.take_rows(self._manifest, inputs, places),
                [versions[place] for place in places.tolist()],
                apart=True,
                outputs=outputs,
                timeout=timeout,
                since=since,
                tenant=tenant,
                priority=priority,
                timing=timing,
            )
            gathered.put(places, answer)
        return gathered.whole()
