"""`health`: whether a server on this machine is live, as an exit code."""

from __future__ import annotations

from pathlib import Path

import click

from tpeft_deploy.cli.console import Command, note

__all__ = ["health"]

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", envvar="TPEFT_HOST", show_default=True, help="Address of the server.")
@click.option("--port", type=int, default=8080, envvar="TPEFT_PORT", show_default=True, help="HTTP port.")
@click.option("--tls-cert", type=click.Path(path_type=Path), envvar="TPEFT_TLS_CERT", help="Given: ask over TLS.")
@click.option("--ready", is_flag=True, help="Ask whether requests are taken, which a server that drains says no to.")
@click.option("--timeout", type=float, default=2.0, show_default=True, help="Seconds to wait for the answer.")
def health(host: str, port: int, tls_cert: Path | None, ready: bool, timeout: float) -> None:
    """Ask a server on this machine whether it is live: exit code 0 if it is, 1 if not.

    For the health checks of containers.  The certificate is not verified: it is rarely made for this address.
    """
    import http.client
    import ssl

    from tpeft_deploy.errors import ServerError

    address = _ANY.get(host, host)
    asked = "ready" if ready else "live"
    connection = (
        http.client.HTTPConnection(address, port, timeout=timeout)
        if tls_cert is None
        else http.client.HTTPSConnection(address, port, timeout=timeout, context=ssl._create_unverified_context())
    )
    try:
        connection.request("GET", f"/v2/health/{asked}")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"ask {address}:{port} whether it is {asked}", problem=str(error) or repr(error)) from None
    finally:
        connection.close()
    if status != 200:
        raise ServerError(f"ask {address}:{port} whether it is {asked}", expected="status 200", got=status)
    note(asked)
