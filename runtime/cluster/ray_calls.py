"""Calls of replicas by a deployment handle of Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from tpeft_deploy.errors import QueueFull, RunError, brief
from tpeft_deploy.runtime.cluster.calls import ReplicaLost
from tpeft_deploy.runtime.cluster.wire import CallRoute

__all__ = ["RayCalls"]


class RayCalls:
    """See `ReplicaCalls`.

    Args:
        handle: handle of the replicas' deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def call(self, method: str, route: CallRoute, *arguments: Any) -> Any:
        """Call a method of a replica."""
        with _errors(method):
            response = getattr(self._handle, method).remote(route, *arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise

    async def stream(self, method: str, route: CallRoute, *arguments: Any) -> AsyncGenerator[Any]:
        """Iterate over what a method of a replica yields."""
        with _errors(method):
            response = getattr(self._streaming, method).remote(route, *arguments)
            try:
                async for step in response:
                    yield step
            finally:
                response.cancel()  # nothing, once it is over


@contextmanager
def _errors(method: str) -> Iterator[None]:
    doing = f"call {method!r} of a replica"
    try:
        yield
    except (RayActorError, ObjectLostError, DeploymentUnavailableError) as error:
        raise ReplicaLost(doing, problem="the replica is gone", fix="Try again shortly.") from error
    except BackPressureError as error:
        raise QueueFull(doing, problem="too many calls wait", fix="Try again shortly.") from error
    except RayTaskError as error:
        raise RunError(doing, problem=brief(error.cause or error)) from error
