"""Clients of a tpeft_deploy server: `Client`, and `AsyncClient` for asyncio.

Both use V2 REST with the binary tensor extension, through httpx.
"""

from tpeft_deploy.errors import MissingExtra

try:
    import httpx as _httpx  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtra(
        "load the client",
        expected="httpx to be installed",
        got=str(error),
        fix="pip install 'tpeft-deploy[client]'.",
    ) from error

from tpeft_deploy.client.asynchronous import AsyncClient
from tpeft_deploy.client.blocking import Client

__all__ = ["AsyncClient", "Client"]
