"""Asking a server over HTTP, with the keys of its tenants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from tpeft_deploy import Adapter


class Asking:
    """A server on a port of the loopback, and keys to it by tenant and role."""

    def __init__(self, port: int, keys: Mapping[tuple[str, str], str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.keys = keys
        # Certificates take longer to read than most answers, and nobody asks for one here.
        self.client = httpx.Client(base_url=self.url, timeout=100, verify=False)

    def headers(self, tenant: str = "acme", role: str = "deploy") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant, role]}"}

    def ask(self, method: str, path: str, tenant: str = "acme", role: str = "deploy", **more: Any) -> httpx.Response:
        headers = self.headers(tenant, role) | more.pop("headers", {})
        return self.client.request(method, path, headers=headers, **more)

    def register(self, adapter: Adapter, name: str = "mood", tenant: str = "acme") -> httpx.Response:
        path = f"/v2/registry/tasks/{name}/versions"
        return self.ask("POST", path, tenant, files={"weights": adapter.to_bytes()})
