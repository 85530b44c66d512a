"""Router of Ray Serve over the replica table: the rows of an adapter go where it is."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tpeft_deploy.runtime.cluster.affinity import ReplicaTable, table_of
from tpeft_deploy.runtime.cluster.wire import CallRoute, Figures

__all__ = ["AdapterAffineRouter"]

FIGURES = "figures"


class AdapterAffineRouter(RequestRouter):  # type: ignore[misc]
    """Chooses replicas by `placement`; the first argument of a call is its `CallRoute`."""

    @property
    def table(self) -> ReplicaTable:
        """Table of the deployment's replicas in this process."""
        return table_of(str(self._deployment_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over replicas that came or went, and what they reported."""
        super().update_replicas(replicas)
        found: dict[str, Figures | None] = {
            own.replica_id.unique_id: (own.routing_stats or {}).get(FIGURES) for own in replicas
        }
        self.table.update(found)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica, then the others for when that is full."""
        route: Any = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if not isinstance(route, CallRoute):
            return [candidate_replicas]
        name = route.replica or self.table.choose(route.digest, route.rows, route.avoid)
        first = [own for own in candidate_replicas if own.replica_id.unique_id == name]
        others = [own for own in candidate_replicas if own.replica_id.unique_id not in {name, route.avoid}]
        return [first, others] if first else [others or candidate_replicas]
