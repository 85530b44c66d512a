"""Small adapters, and the shortest way to register one."""

from __future__ import annotations

import functools
import threading

from tests.helpers import nets
from tpeft_deploy import Adapter
from tpeft_deploy.runtime.server.registry import State, VersionRecord

_BUILDING = threading.Lock()  # torch's random numbers are common to all threads


@functools.cache
def adapter(seed: int) -> Adapter:
    with _BUILDING:
        return nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=seed)


def unchecked(_record: VersionRecord, _adapter: Adapter) -> None:
    """Takes any adapter."""


def add(state: State, tenant: str = "acme", name: str = "mood", seed: int = 0, alias: str = "current") -> VersionRecord:
    return state.tasks.add(tenant, name, adapter(seed), unchecked, by="a key", alias=alias)
