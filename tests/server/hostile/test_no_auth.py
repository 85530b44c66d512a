"""Without keys: pages of other sites reach nothing through a browser on this machine, and no key outlives the mode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.server.conftest import serve
from tpeft_deploy import Bundle
from tpeft_deploy.errors import Conflict
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.operations.options import Options
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.rest.app import application
from tpeft_deploy.runtime.server.tenancy.access import LOCAL
from tpeft_deploy.runtime.server.tenancy.local_only import LocalOnly


@pytest.fixture(scope="module")
def service(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    own = serve(conv_bundle, tmp_path_factory.mktemp("local") / "state")
    yield Service(own.runtime, own.bundle, own.state, own.service.admin._order, Options(authenticate=False))
    own.runtime.close()
    own.state.close()


def asked(
    service: Service, method: str, path: str, headers: dict[str, str]
) -> tuple[httpx.Response, list[RequestContext]]:
    told: list[RequestContext] = []

    async def main() -> httpx.Response:
        app = application(service, observe=told.append)
        transport = httpx.ASGITransport(LocalOnly(app, app.refuse))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            body = b'{"tenant": "evil", "role": "admin"}' if method == "POST" else b""
            return await client.request(method, path, headers=raw, content=body)

    return asyncio.run(main()), told


GOOD = [
    "localhost",
    "LocalHost:1",
    "localhost.",
    "a.b.localhost:80",
    "127.0.0.1:8080",
    "127.9.8.7",
    "[::1]",
    "[::1]:99",
]
EVIL = [
    *("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", ""),
    *(
        "192.168.0.1",
        "0.0.0.0",
        "[::]",
        "[::ffff:8.8.8.8]",
        "8.8.8.8#127.0.0.1",
        "127.0.0.1@evil.example",
        "localhost:",
    ),
    *("127.0.0.1:8080, evil.example", "2130706433", "localhost:999999", "[::1", "127.0.0.1 ", "loc\xe4lhost"),
]


@pytest.mark.parametrize("host", GOOD)
def test_loopback_names_are_answered(service: Service, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    assert asked(service, "GET", "/v2/admin/keys", headers)[0].status_code == 200


@pytest.mark.parametrize("host", EVIL)
@pytest.mark.parametrize("path", ["/v2/admin/keys", "/v2/health/live", "/v2/models/base/infer"])
def test_other_hosts_are_refused(service: Service, host: str, path: str) -> None:
    answer, told = asked(service, "POST", path, {"host": host})
    assert answer.status_code == 403
    assert "Host" in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert [one.status for one in told] == [403]


@pytest.mark.parametrize(
    "headers",
    [
        *({"origin": f"http://{host}"} for host in EVIL),
        {"origin": "null"},
        {"origin": "file://localhost"},
        {"origin": "http://localhost/path"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://localhost:3000"},
        {"sec-fetch-site": "CROSS-SITE"},
        {"sec-fetch-site": "x" * 100_000},
    ],
)
def test_other_sites_are_refused(service: Service, headers: dict[str, str]) -> None:
    answer, _ = asked(service, "POST", "/v2/admin/keys", {"content-type": "text/plain", **headers})
    assert answer.status_code == 403
    assert len(answer.content) < 1000
    assert service._state.keys.list(None) == []


def test_no_key_is_created(service: Service) -> None:
    answer, _ = asked(service, "POST", "/v2/admin/keys", {})
    assert answer.status_code == 409
    assert "--no-auth" in answer.json()["error"]
    with pytest.raises(Conflict):
        asyncio.run(service.admin.create_key(LOCAL, "evil", "admin"))
    assert service._state.keys.list(None) == []
