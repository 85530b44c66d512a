"""The Ray Serve application: an ingress over replicas, each of one runtime."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import brief
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.cluster.affinity import table_of
from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
from tpeft_deploy.runtime.cluster.ingress import Ingress
from tpeft_deploy.runtime.cluster.placement import AffinePlacement
from tpeft_deploy.runtime.cluster.ray_calls import RayCalls
from tpeft_deploy.runtime.cluster.replica import ReplicaRuntime, ToldQuotas
from tpeft_deploy.runtime.cluster.router import FIGURES, AdapterAffineRouter
from tpeft_deploy.runtime.cluster.scaling import ROWS, WaitingRows
from tpeft_deploy.runtime.cluster.wire import CallRoute, GenerateCall, InferCall, digest_of
from tpeft_deploy.runtime.heap import settle_heap
from tpeft_deploy.runtime.private_copy import PrivateCopy
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.registry.files.disk_cache import DiskCache
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore
from tpeft_deploy.runtime.server.registry.files.store import AdapterStore
from tpeft_deploy.runtime.server.registry.files.stored_objects import open_objects
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.sessions.providers import choose

__all__ = ["build"]

_log = logging.getLogger("tpeft_deploy.cluster")
_REPORT_SECONDS = 1.0
_ONGOING = 1024  # calls that a replica takes at once; its queue joins them, and refuses what is too much
_PEER_SECONDS = 10.0
_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}  # the ingress has an access log


class RayReplica:
    """A `ReplicaRuntime` as a deployment.

    Args:
        arguments: arguments of the application.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        cluster = ClusterSettings.of(arguments)
        settings = cluster.settings
        bundle = Bundle.open(cluster.path)
        limits = settings.limits(bundle, choose(settings.provider, allow_tf32=settings.allow_tf32).device)
        quotas = ToldQuotas()
        order = quotas.orders(limits)
        runtime = Runtime(
            cluster.path,
            **settings.runtime_options,
            limits=limits,
            order=order,
            sequence_order=order.sequences,
            preload=False,
        )
        self._directory = PrivateCopy(bundle, ())  # removed by a later replica if this one is killed
        store = _store(settings, self._directory.path / "adapters")
        self._replica = ReplicaRuntime(bundle, runtime, quotas, store.read)
        with ThreadPoolExecutor(1) as pool:  # waiting for other replicas is not allowed on the deployment's loop
            pool.submit(_warm, self._replica, bundle).result()
        settle_heap()

    async def infer(self, route: CallRoute, call: InferCall) -> Any:
        """See `ReplicaRuntime.infer`."""
        return await self._replica.infer(route, call)

    async def generate(self, route: CallRoute, call: GenerateCall) -> AsyncGenerator[Any]:
        """See `ReplicaRuntime.generate`."""
        steps = self._replica.generate(route, call)
        try:
            async for step in steps:
                yield step
        finally:
            await steps.aclose()

    async def control(self, route: CallRoute, method: str, names: list[str], options: dict[str, Any]) -> Any:
        """See `ReplicaRuntime.control`."""
        return await self._replica.control(route, method, names, options)

    async def report(self, route: CallRoute) -> Any:
        """See `ReplicaRuntime.report`."""
        return await self._replica.report(route)

    async def hottest(self, route: CallRoute) -> list[str]:
        """See `ReplicaRuntime.hottest`."""
        return await self._replica.hottest(route)

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what routers choose by; called every second."""
        return {FIGURES: self._replica.figures()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the number of replicas is chosen by."""
        return {ROWS: float(self._replica.rows)}

    def __del__(self) -> None:
        """Release the runtime."""
        if hasattr(self, "_replica"):
            self._replica.runtime.close()
        if hasattr(self, "_directory"):
            self._directory.close()


class RayIngress:
    """An `Ingress` as a deployment.

    Args:
        arguments: arguments of the application.
        replicas: handle of the replicas.
    """

    async def __init__(self, arguments: Mapping[str, Any], replicas: DeploymentHandle) -> None:  # type: ignore[misc]
        table = table_of(str(replicas.deployment_id))
        self._ingress = await Ingress.open(ClusterSettings.of(arguments), RayCalls(replicas), table)
        settle_heap()

    def __serve_build_asgi_app__(self) -> Any:
        return self._ingress.application

    def check_health(self) -> None:
        """Raise if the ingress has to be replaced."""
        self._ingress.check()

    async def __del__(self) -> None:
        """Close the ingress."""
        if hasattr(self, "_ingress"):
            await self._ingress.close()


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Build the application; what a configuration names as its import path.

    Args:
        arguments: fields of `ClusterSettings`.

    Raises:
        ServerError: the arguments do not fit.
    """
    cluster = ClusterSettings.of(arguments)
    drain = cluster.settings.drain_seconds
    number: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas is not None:
        policy = AutoscalingPolicy(policy_function=WaitingRows, policy_kwargs={"per_replica": cluster.rows_per_replica})
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas, max_replicas=cluster.max_replicas, policy=policy
            )
        }
    replica = serve.deployment(
        RayReplica,
        name="replica",
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterAffineRouter, request_routing_stats_period_s=_REPORT_SECONDS
        ),
        graceful_shutdown_timeout_s=drain,
        logging_config=_LOGGING,
        **number,
    )
    ingress = serve.deployment(
        serve.ingress()(RayIngress),
        name="ingress",
        num_replicas=cluster.ingresses,
        max_ongoing_requests=16 * _ONGOING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain,
        logging_config=_LOGGING,
    )
    return ingress.bind(dict(arguments), replica.bind(dict(arguments)))


def _store(settings: Settings, cache: Path) -> AdapterStore:
    """Return the adapters' store for reading, with a disk cache of this replica where it is an object store."""
    if settings.store_url is None:
        return Blobs(settings.state / "blobs")
    objects = open_objects(settings.store_url, settings.store_timeout)
    return ObjectStore(objects, DiskCache(cache, settings.cache_bytes))


def _warm(replica: ReplicaRuntime, bundle: Bundle) -> None:
    """Bring what will be routed to a new replica, of what its peers were asked for and of the bundle's tasks."""
    context = serve.get_replica_context()
    own = context.replica_id.unique_id
    names = list(bundle.tasks)
    peers: tuple[str, ...] = ()
    try:
        running = serve.status().applications[context.app_name].deployments[context.deployment]
        if running.replica_states.get("RUNNING", 0):
            handle = serve.get_deployment_handle(context.deployment, context.app_name)
            names = [*handle.hottest.remote(CallRoute()).result(timeout_s=_PEER_SECONDS), *names]
            peers = table_of(str(handle.deployment_id)).replicas
    except Exception as error:  # a replica that nobody warms is slow at first, and right
        _log.warning("cannot ask other replicas for their adapters: %s", brief(error))
    placement = AffinePlacement()
    placement.update(dict.fromkeys([*peers, own], 1.0))
    digests = {name: digest_of(name) or bundle.tasks[name] for name in dict.fromkeys(names)}
    mine = set(placement.belonging(own, digests.values()))
    replica.warm([name for name, digest in digests.items() if digest in mine])
