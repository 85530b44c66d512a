"""`cluster`: serve a bundle on several replicas with Ray Serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.console import Provider, server_packages
from tpeft_deploy.cli.tool import Command, Group, note
from tpeft_deploy.errors import requires

if TYPE_CHECKING:
    from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings

__all__ = ["cluster"]

_OWN = {"replicas", "max_replicas", "cpus", "gpus"}


@click.group(cls=Group)
def cluster() -> None:
    """Serve a bundle on several replicas, with Ray Serve."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.argument("bundle", type=click.Path(path_type=Path)),
            click.option("--replicas", type=click.IntRange(1), help="Number of replicas (default 2)."),
            click.option("--max-replicas", type=click.IntRange(1), help="Replicas that waiting rows may lead to."),
            click.option("--cpus", type=click.FloatRange(0), help="CPU cores of a replica (default 1)."),
            click.option("--gpus", type=click.FloatRange(0), help="GPUs of a replica (default 0)."),
            click.option("--state", type=click.Path(path_type=Path), help="State directory."),
            click.option("--database-url", help="PostgreSQL URL; better in TPEFT_DATABASE_URL."),
            click.option("--host", help="Address to listen on (default 127.0.0.1)."),
            click.option("--port", type=click.IntRange(1, 65535), help="HTTP port (default 8080)."),
            click.option("--grpc-port", type=click.IntRange(1, 65535), help="gRPC port (default: no gRPC)."),
            click.option("--no-auth", is_flag=True, default=None, help="Disable authentication; only on loopback."),
            click.option("--provider", type=Provider(), help="Execution provider (default auto)."),
            click.option("--threads", type=click.IntRange(1), help="Intra-op threads per session."),
            click.option("--device-bytes", help="Device memory for adapters of a replica, such as 2GiB."),
        )
    ):
        command = option(command)
    return command


@cluster.command(cls=Command)
@_options
def up(bundle: Path, **flags: Any) -> None:
    """Serve BUNDLE on replicas until SIGTERM: on this machine or, with RAY_ADDRESS, on the cluster there."""
    own = _settings(bundle, flags)
    with requires("ray", "ray", "start a cluster"):
        from tpeft_deploy.runtime.cluster.up import up as run
    run(own, note)


@cluster.command(cls=Command)
@_options
def config(bundle: Path, **flags: Any) -> None:
    """Print the configuration that `serve deploy` and KubeRay take, as YAML."""
    own = _settings(bundle, flags)
    from tpeft_deploy.runtime.cluster.config import serve_config, to_yaml

    click.echo(to_yaml(serve_config(own)), nl=False)


def _settings(bundle: Path, flags: dict[str, Any]) -> ClusterSettings:
    with server_packages("configure a cluster"):
        from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings

        given = {name: value for name, value in flags.items() if value is not None}
        own = {name: value for name, value in given.items() if name in _OWN}
        server = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        return ClusterSettings(str(bundle), {name: server[name] for name in server if name not in _OWN}, **own)
