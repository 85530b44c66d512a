"""`serve`: one bundle to many tenants."""

from __future__ import annotations

from pathlib import Path

import click

from tpeft_deploy.cli.console import Command

__all__ = ["serve"]


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--state", type=click.Path(path_type=Path), help="Directory of keys, tenants and adapters.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file with settings.")
@click.option("--host", help="Address to listen on; 127.0.0.1 by default.")
@click.option("--port", type=click.IntRange(0, 65535), help="Of HTTP; 8080 by default, 0 takes a free one.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Of gRPC; none by default.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--no-auth", is_flag=True, default=None, help="Ask for no keys; on a loopback address only.")
@click.option("--provider", type=click.Choice(["auto", "cuda", "cpu"]), help="Execution provider; auto by default.")
@click.option("--threads", type=click.IntRange(1), help="Of each session; one per core by default.")
@click.option("--device-bytes", help="What adapters may take on the device, such as 2GiB.")
@click.option("--folded-bytes", help="What sessions of hot tasks may take, such as 4GiB; none by default.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="info by default.")
@click.option("--access-log/--no-access-log", default=None, help="A line of JSON for each request; on by default.")
def serve(bundle: Path, config: Path | None, **flags: object) -> None:
    """Serve BUNDLE over HTTP and gRPC, in the Open Inference Protocol V2.

    Every request needs a key: make one with 'tpeft-deploy keys create'.  What is not given here comes from TPEFT_
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
