"""`serve` and `health`: run a server, and probe one."""

from __future__ import annotations

from pathlib import Path

import click

from tpeft_deploy.cli.console import Provider, devices_option, server_packages
from tpeft_deploy.cli.tool import Command, note

__all__ = ["health", "serve"]

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


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
@click.option("--provider", type=Provider(), help="Execution provider (default auto).")
@devices_option
@click.option("--threads", type=click.IntRange(1), help="Intra-op threads per session (default: one per core).")
@click.option("--device-bytes", help="Device memory for adapters, such as 2GiB.")
@click.option("--folded-bytes", help="Memory for folded sessions of hot tasks, such as 4GiB (default 0).")
@click.option("--allow-tf32", is_flag=True, default=None, help="Compute float32 products in TF32 on CUDA.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Log level (default info).")
@click.option("--access-log/--no-access-log", default=None, help="Write a JSON line per request (default on).")
def serve(bundle: Path, config: Path | None, **flags: object) -> None:
    """Serve BUNDLE over HTTP and gRPC, in the Open Inference Protocol V2.

    Every request needs a key: make one with 'tpeft-deploy keys create'.  Settings not given here come from TPEFT_
    variables, then from the file, then from defaults.
    """
    with server_packages("start the server"):
        from tpeft_deploy.runtime.server.main import serve as run
        from tpeft_deploy.runtime.server.settings import read
    run(bundle, read(config, {name: value for name, value in flags.items() if value is not None}))


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", envvar="TPEFT_HOST", show_default=True, help="Address of the server.")
@click.option("--port", type=int, default=8080, envvar="TPEFT_PORT", show_default=True, help="HTTP port.")
@click.option("--tls-cert", type=click.Path(path_type=Path), envvar="TPEFT_TLS_CERT", help="Connect with TLS.")
@click.option("--ready", is_flag=True, help="Check readiness instead of liveness; a draining server is not ready.")
@click.option("--timeout", type=float, default=2.0, show_default=True, help="Seconds to wait for the response.")
def health(host: str, port: int, tls_cert: Path | None, ready: bool, timeout: float) -> None:
    """Check whether a server on this machine is live: exit code 0 if it is, 1 if not.

    For health checks of containers.  The certificate is not verified: it is rarely issued for this address.
    """
    import http.client
    import ssl

    from tpeft_deploy.errors import ServerError

    address = _ANY.get(host, host)
    state = "ready" if ready else "live"
    connection = (
        http.client.HTTPConnection(address, port, timeout=timeout)
        if tls_cert is None
        else http.client.HTTPSConnection(address, port, timeout=timeout, context=ssl._create_unverified_context())
    )
    try:
        connection.request("GET", f"/v2/health/{state}")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"check whether {address}:{port} is {state}", problem=str(error) or repr(error)) from None
    finally:
        connection.close()
    if status != 200:
        raise ServerError(f"check whether {address}:{port} is {state}", expected="status 200", got=status)
    note(state)
