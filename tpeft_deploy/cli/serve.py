"""`serve`: one bundle to many tenants."""

from __future__ import annotations

from pathlib import Path

import click

from tpeft_deploy.cli.console import Command

__all__ = ["serve"]


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--state", type=click.Path(path_type=Path), help="State directory: keys, tenants and adapters.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="HTTP port (default 8080; 0 picks a free port).")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="gRPC port (default: no gRPC).")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="TLS certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="TLS private key, PEM.")
@click.option("--no-auth", is_flag=True, default=None, help="Disable authentication; only on a loopback address.")
@click.option("--provider", type=click.Choice(["auto", "cuda", "cpu"]), help="Execution provider (default auto).")
@click.option("--threads", type=click.IntRange(1), help="Intra-op threads per session (default: one per core).")
@click.option("--device-bytes", help="Device memory for adapters, such as 2GiB.")
@click.option("--folded-bytes", help="Memory for folded sessions of hot tasks, such as 4GiB (default 0).")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Log level (default info).")
@click.option("--access-log/--no-access-log", default=None, help="Write a JSON line per request (default on).")
def serve(bundle: Path, config: Path | None, **flags: object) -> None:
    """Serve BUNDLE over HTTP and gRPC, in the Open Inference Protocol V2.

    Every request needs a key: make one with 'tpeft-deploy keys create'.  Settings not given here come from TPEFT_
    variables, then from the file, then from defaults.
    """
    from tpeft_deploy.errors import MissingExtra

    try:
        from tpeft_deploy.runtime.server.main import serve as run
        from tpeft_deploy.runtime.server.settings import read
    except ImportError as error:
        if (error.name or "").startswith("tpeft_deploy"):
            raise
        raise MissingExtra(
            "start the server", expected="its packages", got=str(error), fix="pip install 'tpeft-deploy[server,cpu]'."
        ) from error
    run(bundle, read(config, {name: value for name, value in flags.items() if value is not None}))
