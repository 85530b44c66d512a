"""A `ClusterLoad` behind a proxy that loses answers: it learns exactly what became of each change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.helpers import nets
from tests.helpers.runtime.cluster_load import REFUSED, ClusterLoad
from tests.helpers.server.acknowledged import Log, everything_is_as_acknowledged
from tests.helpers.server.live import serving_bundle
from tests.helpers.server.load import OPERATOR, TENANTS, Change, Expected, digest_of
from tpeft_deploy import Bundle

FATES = ["late", "late", "lost", "twice", "refused"]


class Proxy(httpx.BaseTransport):
    """Sends requests on; a change may meet a fate: sent later, done without an answer, sent twice, or never sent."""

    def __init__(self, own: httpx.BaseTransport) -> None:
        self._own = own
        self.kept: list[httpx.Request] = []
        self.next = ""  # the fate of the next change

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        fate = self.next if request.method != "GET" and "/registry/" in request.url.path else ""
        if not fate:
            return self._own.handle_request(request)
        self.next = ""
        request.read()
        copy = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
        if fate == "twice":
            self.send(copy)
            return self._own.handle_request(request)
        if fate == "lost":
            self.send(copy)
        if fate == "late":
            self.kept.append(copy)
        if fate == "refused":
            return httpx.Response(503, headers={"Retry-After": "1"}, json={"error": "a part was lost"})
        raise httpx.ReadError("the connection was cut", request=request)

    def send(self, request: httpx.Request) -> int:
        answer = self._own.handle_request(request)
        answer.read()
        return answer.status_code

    def send_kept(self) -> list[int]:
        kept, self.kept = self.kept, []
        return [self.send(request) for request in kept]

    def close(self) -> None:
        """Stay open for what is sent later."""


class ProxiedLoad(ClusterLoad):
    proxy: Proxy
    kept: Log

    def client(self, tenant: str) -> httpx.Client:
        own = super().client(tenant)
        return httpx.Client(
            base_url=own.base_url, headers=own.headers, event_hooks=own.event_hooks, transport=self.proxy, timeout=100
        )

    def settled_and_as_acknowledged(self) -> None:
        self.kept.settle()
        everything_is_as_acknowledged(self)
        self.judge()


@pytest.fixture(scope="module")
def uploads() -> dict[str, bytes]:
    """Digest -> file, of adapters that the bundle does not have."""
    made = [nets.adapter_for(nets.conv_net()[0], {"up.weight": (4, 4)}, seed=10 * n) for n in range(4)]
    return {digest_of(adapter.to_bytes()): adapter.to_bytes() for adapter in made}


@pytest.fixture(scope="module")
def expected(conv_bundle: Bundle, uploads: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return Expected.of(conv_bundle, uploads, tmp_path_factory.mktemp("uploads"))


@pytest.fixture
def load(conv_bundle: Bundle, uploads: dict[str, bytes], expected: Expected, tmp_path: Path) -> Iterator[ProxiedLoad]:
    with serving_bundle(conv_bundle, tmp_path) as live, httpx.HTTPTransport() as transport:
        keys = {
            tenant: live.keys[tenant, "admin" if tenant == OPERATOR else "deploy"] for tenant in (*TENANTS, OPERATOR)
        }
        own = ProxiedLoad(keys, uploads, expected, conv_bundle.manifest.name)
        own.url, own.proxy, own.kept = live.url, Proxy(transport), Log(own, len(live.keys))
        yield own


@pytest.mark.parametrize("landing", ["before the next change", "after the next change"])
def test_a_late_change_is_done_once_or_never(load: ProxiedLoad, landing: str) -> None:
    proxy, (first, second, *_) = load.proxy, load.uploads
    history = load.histories["acme", "mood"]
    with load.client("acme") as http:
        load._change(http, "acme", "mood", Change("register", digest=first))
        proxy.next = "late"
        with pytest.raises(httpx.ReadError):
            load._change(http, "acme", "mood", Change("register", digest=second))
        assert set(history.now.versions) == {1}
        if landing == "before the next change":
            assert proxy.send_kept() == [200]
        load._change(http, "acme", "mood", Change("point", "canary", 1))
        assert proxy.send_kept() in ([], [412])
    assert set(history.now.versions) == ({1, 2} if landing == "before the next change" else {1})
    assert ("canary" in history.now.aliases) == (landing == "after the next change")
    assert load.unclear == {"not done yet": 1} | ({"done later": 1} if len(history.now.versions) == 2 else {})
    load.settled_and_as_acknowledged()


def test_a_late_first_version_never_lands_on_a_deleted_task(load: ProxiedLoad) -> None:
    proxy, (first, second, *_) = load.proxy, load.uploads
    with load.client("acme") as http:
        proxy.next = "late"
        with pytest.raises(httpx.ReadError):
            load._change(http, "acme", "mood", Change("register", digest=first))
        load._change(http, "acme", "mood", Change("register", digest=second))
        for seed in range(40):  # none of which deletes the task
            load._change_tasks(http, "acme", random.Random(seed))
        assert proxy.send_kept() == [412]
    load.settled_and_as_acknowledged()


@pytest.mark.parametrize("seed", [1])
def test_whatever_the_proxy_does_the_log_is_as_acknowledged(load: ProxiedLoad, seed: int) -> None:
    proxy, choice = load.proxy, random.Random(seed)
    for _ in range(2):
        for tenant in TENANTS:
            with load.client(tenant) as http:
                for _ in range(25):
                    proxy.next = choice.choice(FATES) if choice.random() < 0.4 else ""
                    with suppress(*REFUSED):
                        load._change_tasks(http, tenant, choice)
                    if choice.random() < 0.3:
                        proxy.send_kept()
                    with suppress(*REFUSED):
                        load._ask(http, tenant, choice)
                proxy.next = ""
                load.settle_doubts(http, tenant)
        assert set(proxy.send_kept()) <= {404, 409, 412}
        load.settled_and_as_acknowledged()
    assert load.unclear["done"]
    assert load.unclear["done later"]
    assert load.unclear["not done yet"]
