"""How an ingress reaches the replicas: what `RemoteRuntime` needs of the cluster's software."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from tpeft_deploy.errors import Unavailable
from tpeft_deploy.runtime.cluster.wire import CallRoute

__all__ = ["ReplicaCalls", "ReplicaLost"]


class ReplicaLost(Unavailable):
    """Raised for a call of which the replica died, or took no more calls."""


class ReplicaCalls(Protocol):
    """Calls of methods of `ReplicaRuntime`."""

    async def call(self, method: str, route: CallRoute, *arguments: Any) -> Any:
        """Call a method; cancelling cancels it there.

        Args:
            method: name of the method.
            route: the first argument of the method, which the replica is chosen by.
            arguments: the others.

        Raises:
            ReplicaLost: the replica died.
            QueueFull: too many calls wait for a replica.
        """

    def stream(self, method: str, route: CallRoute, *arguments: Any) -> AsyncGenerator[Any]:
        """Iterate over what a method yields; takes and raises what `call` does, and closing it cancels it there."""
