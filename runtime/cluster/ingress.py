"""The ingress: the server's protocols, keys, quotas and registry, over remote replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from typing import Any, Self, cast

from starlette.types import Receive, Scope, Send

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.cluster.affinity import ReplicaTable
from tpeft_deploy.runtime.cluster.calls import ReplicaCalls
from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
from tpeft_deploy.runtime.cluster.remote.remote_runtime import RemoteRuntime
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.main import open_service, rest_application, rpc_server
from tpeft_deploy.runtime.server.operations.options import order_of
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.rpc.server import RpcServer
from tpeft_deploy.runtime.server.telemetry.access_log import AccessLog
from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines

__all__ = ["Ingress"]


class Ingress:
    """A service over replicas, with its ASGI application and its gRPC server; made by `open`.

    Args:
        service: the service.
        application: its ASGI application.
        grpc: its gRPC server, if the settings have a port.
        opened: closed with it.

    Attributes:
        service: the service.
        application: its ASGI application.
    """

    def __init__(
        self,
        service: Service,
        application: Callable[[Scope, Receive, Send], Awaitable[None]],
        grpc: RpcServer | None,
        opened: ExitStack,
    ) -> None:
        self.service = service
        self.application = application
        self._grpc = grpc
        self._opened = opened
        self._background = [asyncio.create_task(own) for own in (service.sweep(), service.renew_lease())]

    @classmethod
    async def open(cls, settings: ClusterSettings, calls: ReplicaCalls, table: ReplicaTable) -> Self:
        """Open the registry, wait for a replica, and start to serve.

        Args:
            settings: settings of the cluster.
            calls: calls of the replicas.
            table: figures of the replicas.

        Raises:
            ServerError, BundleError: it cannot start.
        """
        own, loop = settings.settings, asyncio.get_running_loop()
        bundle = await asyncio.to_thread(Bundle.open, settings.path)
        with ExitStack() as stack:
            lines = stack.enter_context(closing(LogLines()))
            state = stack.enter_context(
                await asyncio.to_thread(open_state, own.state, own.database_url, default=own.quota, **own.store_options)
            )
            runtime = RemoteRuntime(bundle, calls, table, state.tenants.quota, loop)
            await runtime.open()
            limits = own.limits(bundle, runtime.provider)
            order = order_of(state, limits)
            # Not on the loop: the service restores its pins, and waits for replicas that this loop talks to.
            service, metrics = await asyncio.to_thread(
                open_service, cast(Runtime, runtime), bundle, state, order, limits, own, stack, lines
            )
            log = AccessLog(lines) if own.access_log else None

            def observe(context: RequestContext) -> None:
                metrics.request(context)
                if log is not None:
                    log.write(context)

            intake = own.intake
            grpc = rpc_server(service, own, observe, intake, None)
            if grpc is not None:
                await grpc.start()
            application: Any = rest_application(service, own, observe, intake)
            return cls(service, application, grpc, stack.pop_all())

    def check(self) -> None:
        """Raise if the ingress has to be replaced: its files or its database are gone."""
        if not self.service.ready():
            raise RuntimeError("the ingress is not ready")

    async def close(self, seconds: float = 5.0) -> None:
        """End requests that came by gRPC, and close the registry."""
        self.service.refuse()
        for task in self._background:
            task.cancel()
        if self._grpc is not None:
            await self._grpc.stop(seconds)
        await asyncio.to_thread(self._opened.close)
