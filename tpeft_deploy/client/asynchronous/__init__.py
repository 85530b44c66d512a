"""The asynchronous client."""

from tpeft_deploy.client.asynchronous.client import AsyncClient

__all__ = ["AsyncClient"]
