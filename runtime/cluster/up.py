"""A cluster started from here: on this machine, or on a Ray cluster that runs already."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import ray
from ray import serve
from ray.exceptions import RayError

from tpeft_deploy.errors import ServerError, brief
from tpeft_deploy.runtime.cluster.application import build
from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
from tpeft_deploy.runtime.cluster.config import NAME
from tpeft_deploy.runtime.cluster.proxy_answers import MIDDLEWARES, PROXY_CALLBACK
from tpeft_deploy.runtime.server.settings import is_loopback

__all__ = ["start", "stop", "up"]


def start(cluster: ClusterSettings, *, cores: int | None = None) -> None:
    """Start the application, and wait until it serves.

    Args:
        cluster: settings of the cluster.
        cores: CPU cores of a Ray that is started here; by default those of the machine.

    Raises:
        ServerError: it cannot start.
    """
    settings = cluster.settings
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(PROXY_CALLBACK, MIDDLEWARES)  # for proxies of a Ray that is started here
        # Ray kills a proxy that takes longer, and starts another, which a busy machine may repeat for ever.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level="warning")
        else:
            # "local", as Ray takes whichever cluster was last started on this machine otherwise.
            ray.init("local", num_cpus=cores, include_dashboard=False, logging_level="warning")
    doing = "start the cluster"
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(build({**cluster.arguments(), "server": dict(cluster.server)}), name=NAME, route_prefix="/")
    except (RuntimeError, RayError) as error:
        raise ServerError(
            doing, problem=brief(error), fix="Its logs are in /tmp/ray/session_latest/logs/serve."
        ) from error


def stop() -> None:
    """End the application, and the Ray that was started with it."""
    serve.shutdown()
    ray.shutdown()


def up(cluster: ClusterSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        cluster: settings of the cluster.
        say: called with lines for the user.

    Raises:
        ServerError: it cannot start.
    """
    asked = threading.Event()
    settings = cluster.settings
    try:
        start(cluster)
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set others meanwhile
            signal.signal(number, lambda *_: asked.set())
        if not is_loopback(settings.host):
            say(f"WARNING: no TLS on {settings.host}: let nothing but a proxy with TLS reach this port.")
        say(f"serving on http://{settings.host}:{settings.port} with {cluster.replicas} replicas")
        asked.wait()
    finally:
        stop()
    say("stopped")
