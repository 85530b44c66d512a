"""Replicas in this process, without a cluster: what a `RemoteRuntime` calls in tests."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Callable
from typing import Any

from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.cluster.affinity import ReplicaTable
from tpeft_deploy.runtime.cluster.calls import ReplicaLost
from tpeft_deploy.runtime.cluster.replica import ReplicaRuntime, ToldQuotas
from tpeft_deploy.runtime.cluster.wire import CallRoute


class LocalReplicas:
    """Calls of replicas in this process; arguments and results are pickled as between machines.

    Args:
        bundle: bundle that each has.
        read: reads the file of an adapter by digest.
        count: number of replicas.

    Attributes:
        table: their table.
        log: replica and method of each call.
        dead: replicas that are lost to calls; streams that run are lost at their next step.
    """

    def __init__(self, bundle: Bundle, read: Callable[..., bytes], count: int = 2) -> None:
        self.table = ReplicaTable()
        self.log: list[tuple[str, str]] = []
        self.dead: set[str] = set()
        self.replicas: dict[str, ReplicaRuntime] = {}
        for number in range(count):
            quotas = ToldQuotas()
            order = quotas.orders(Limits())
            runtime = Runtime(
                bundle.path, provider="cpu", threads=1, preload=False, order=order, sequence_order=order.sequences
            )
            self.replicas[f"r{number}"] = ReplicaRuntime(bundle, runtime, quotas, read)
        self.report()

    def report(self) -> None:
        """Tell the table the figures of the replicas that live."""
        self.table.update({name: own.figures() for name, own in self.replicas.items() if name not in self.dead})

    def close(self) -> None:
        """Release the runtimes."""
        for own in self.replicas.values():
            own.runtime.close()

    async def call(self, method: str, route: CallRoute, *arguments: Any) -> Any:
        """See `ReplicaCalls`."""
        own = getattr(self._replica(method, route), method)
        return _sent(await own(*_sent((route, *arguments))))

    async def stream(self, method: str, route: CallRoute, *arguments: Any) -> AsyncGenerator[Any]:
        """See `ReplicaCalls`."""
        steps = getattr(self._replica(method, route), method)(*_sent((route, *arguments)))
        try:
            async for step in steps:
                if route.replica in self.dead:
                    raise ReplicaLost("read a stream", problem="the replica is gone")
                yield _sent(step)
        finally:
            await steps.aclose()

    def _replica(self, method: str, route: CallRoute) -> ReplicaRuntime:
        name = route.replica or next(own for own in self.replicas if own not in self.dead)
        self.log.append((name, method))
        if name in self.dead:
            raise ReplicaLost("call a replica", problem="the replica is gone")
        return self.replicas[name]


def _sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
