"""Dispatch of the requests of `infer`: acquires their versions and passes them to the batcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import CapacityError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.version import Version, adapters
from tpeft_deploy.runtime.batching.calls import Answered, InferOptions
from tpeft_deploy.runtime.batching.worker import Batcher
from tpeft_deploy.runtime.devices.spread import AnyResidency
from tpeft_deploy.tucker import Array

__all__ = ["Dispatcher"]


class Dispatcher:
    """Acquires the versions of requests, once each, and sends them to the batcher, which releases them.

    Args:
        manifest: manifest of the bundle.
        residency: residency of the versions.
        loader: loads versions that are not on the device.
        batcher: joins and runs requests.
    """

    def __init__(self, manifest: Manifest, residency: AnyResidency, loader: AdapterLoader, batcher: Batcher) -> None:
        self._manifest = manifest
        self._residency = residency
        self._loader = loader
        self._batcher = batcher

    async def infer(self, inputs: Mapping[str, Array], versions: Sequence[Version], options: InferOptions) -> Answered:
        """Answer a request.

        Args:
            inputs: arrays from `requests.check_inputs`.
            versions: one for all rows, or, with `options.apart`, one a row.
            options: options of the request.

        Raises:
            AdapterError, BundleError, CapacityError: a version cannot be brought to the device.
            TooLarge, QueueFull, DeadlineExceeded: as the batcher.
        """
        held = self._residency.try_acquire(versions, new=True)
        if held is None:
            self._batcher.check(inputs)  # no adapter is loaded, and none evicted, for a request that is refused
            try:
                left = None if options.timeout is None else options.left
                held = await self._loader.acquire(versions, left, options.tenant)
            except CapacityError:
                distinct = adapters(versions)
                if len(distinct) < 2:
                    raise
                return await self._in_parts(inputs, versions, distinct, options)
        return await self._batcher.infer(inputs, held, options)

    async def _in_parts(
        self,
        inputs: Mapping[str, Array],
        versions: Sequence[Version],
        distinct: Sequence[Version],
        options: InferOptions,
    ) -> Answered:
        """Answer half of the versions after the other, as they do not fit on the device together."""
        first = set(distinct[: (len(distinct) + 1) // 2])
        chosen = np.array([version in first for version in versions])
        gathered = requests.Gathered(options.outputs, len(versions))
        for part in (chosen, ~chosen):
            places = np.flatnonzero(part)
            rows = requests.take_rows(self._manifest, inputs, places)
            gathered.put(places, await self.infer(rows, [versions[place] for place in places.tolist()], options))
        return gathered.whole()
