"""Clients of a tpeft_deploy server: `Client`, and `AsyncClient` for asyncio.

Both use V2 REST with the binary tensor extension, and OpenAI's API for text, through httpx.
"""

from tpeft_deploy.errors import requires

with requires("httpx", "client", "load the client"):
    import httpx as _httpx  # noqa: F401

from tpeft_deploy.client.asynchronous import AsyncClient
from tpeft_deploy.client.blocking import Client

__all__ = ["AsyncClient", "Client"]
