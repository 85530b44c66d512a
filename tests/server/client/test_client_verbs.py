"""Every other call: what is sent, and what is made of the answer; uploads against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests.helpers.server.client_calls import BOTH, Calling, Use
from tests.helpers.server.client_peer import Peer, serving
from tpeft_deploy import AsyncClient, Client
from tpeft_deploy.errors import FormatError, InputError, PreconditionFailed, ServerError

ROOT = Path(__file__).parents[3]
URL = "https://server/below"
ONE = {"name": "t"}
PLACE = "x.safetensors"


@pytest.fixture(params=BOTH)
def call(request: pytest.FixtureRequest) -> Calling:
    return BOTH[request.param]


VERBS: list[tuple[Use, str, str, dict[str, str], object, httpx.Response, object]] = [
    *(
        (use, method, path, query, body, httpx.Response(200, json=ONE), ONE)
        for use, method, path, query, body in [
            (lambda c: c.metadata(), "GET", "/v2", {}, None),
            (lambda c: c.metadata("t@3"), "GET", "/v2/models/t/versions/3", {}, None),
            (lambda c: c.statistics(), "GET", "/v2/models/stats", {}, None),
            (lambda c: c.statistics("a:t"), "GET", "/v2/models/a%3At/stats", {}, None),
            (lambda c: c.task("t"), "GET", "/v2/registry/tasks/t", {"tenant": "acme"}, None),
            (
                lambda c: c.point("t", "live", 2),
                *("PUT", "/v2/registry/tasks/t/aliases/live", {"tenant": "acme"}, {"version": "2"}),
            ),
            (
                lambda c: c.rollback("t"),
                *("POST", "/v2/registry/tasks/t/aliases/current/rollback", {"tenant": "acme"}, {}),
            ),
            (
                lambda c: c.point("t", "live", 2, expected=1),
                *("PUT", "/v2/registry/tasks/t/aliases/live", {"tenant": "acme"}, {"version": "2", "expected": "1"}),
            ),
            (
                lambda c: c.rollback("t", expected="3"),
                *("POST", "/v2/registry/tasks/t/aliases/current/rollback", {"tenant": "acme"}, {"expected": "3"}),
            ),
            (lambda c: c.publish("t"), "POST", "/v2/registry/tasks/t/publish", {"tenant": "acme"}, {}),
            (lambda c: c.publish("t", "b"), "POST", "/v2/registry/tasks/t/publish", {"tenant": "b"}, {}),
            (
                lambda c: c.pin("t", folded=True),
                *("PUT", "/v2/registry/tasks/t/pin", {"tenant": "acme"}, {"folded": True}),
            ),
            (
                lambda c: c.create_key("b", "infer", expires_in=60),
                *("POST", "/v2/admin/keys", {}, {"tenant": "b", "role": "infer", "expires_in": 60}),
            ),
            (lambda c: c.create_key("b", "admin"), "POST", "/v2/admin/keys", {}, {"tenant": "b", "role": "admin"}),
            (
                lambda c: c.set_tenant("b", {"bytes": None, "weight": 2}),
                *("PUT", "/v2/admin/tenants/b", {}, {"bytes": None, "weight": 2}),
            ),
        ]
    ),
    *(
        (use, "GET", path, query, None, httpx.Response(200, json=[ONE]), [ONE])
        for use, path, query in [
            (lambda c: c.tasks(), "/v2/registry/tasks", {"tenant": "acme"}),
            (lambda c: c.keys(), "/v2/admin/keys", {"tenant": "acme"}),
            (lambda c: c.tenants(), "/v2/admin/tenants", {}),
            (
                lambda c: c.history("t", limit=5),
                *("/v2/registry/tasks/t/aliases/current/history", {"tenant": "acme", "limit": "5"}),
            ),
            (lambda c: c.audit(), "/v2/admin/audit", {"limit": "100"}),
            (lambda c: c.audit(5, before=17), "/v2/admin/audit", {"limit": "5", "before": "17"}),
        ]
    ),
    *(
        (use, "DELETE", path, query, None, httpx.Response(status), None)
        for status in (200, 204)
        for use, path, query in [
            (lambda c: c.delete("t"), "/v2/registry/tasks/t", {"tenant": "acme"}),
            (lambda c: c.delete("t", 4), "/v2/registry/tasks/t/versions/4", {"tenant": "acme"}),
            (lambda c: c.unpin("t"), "/v2/registry/tasks/t/pin", {"tenant": "acme"}),
            (lambda c: c.revoke_key("k1"), "/v2/admin/keys/k1", {}),
        ]
    ),
    *(
        (use, "GET", path, {}, None, httpx.Response(status, json={}), status == 200)
        for status in (200, 400, 503)
        for use, path in [
            (lambda c: c.live(), "/v2/health/live"),
            (lambda c: c.ready(), "/v2/health/ready"),
            (lambda c: c.ready("t"), "/v2/models/t/ready"),
        ]
    ),
]


@pytest.mark.parametrize(("use", "method", "path", "query", "body", "answer", "result"), VERBS)
def test_each_call_is_one_request(
    call: Calling,
    use: Use,
    method: str,
    path: str,
    query: dict[str, str],
    body: object,
    answer: httpx.Response,
    result: object,
) -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(answer.status_code, content=answer.content)

    assert call(URL, [use], key="tpk_1_2", tenant="acme", transport=httpx.MockTransport(handle)) == [result]
    (request,) = seen
    assert (request.method, request.url.raw_path.split(b"?")[0].decode()) == (method, f"/below{path}")
    assert dict(request.url.params) == query
    assert request.headers["Authorization"] == "Bearer tpk_1_2"
    assert (json.loads(request.content) if request.content else None) == body
    if body is not None:
        assert request.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("use", "headers"),
    [
        (lambda c: c.point("t", "live", 2, if_match='"7"'), {"if-match": '"7"'}),
        (lambda c: c.rollback("t", if_match="*"), {"if-match": "*"}),
        (lambda c: c.publish("t", if_match='"7", "8"'), {"if-match": '"7", "8"'}),
        (lambda c: c.register("t", PLACE, if_match='"7"'), {"if-match": '"7"'}),
        (lambda c: c.register("t", PLACE, if_none_match=True), {"if-none-match": "*"}),
        (lambda c: c.register("t", PLACE), {}),
        (lambda c: c.delete("t", 4, if_match='"7"'), {"if-match": '"7"'}),
    ],
)
@pytest.mark.parametrize("status", [200, 412])
def test_conditions_are_headers(
    call: Calling, use: Use, headers: dict[str, str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if status == 412:
            return httpx.Response(412, json={"error": "change task 't': ..."})
        return httpx.Response(200, json=ONE, headers={"ETag": '"8"'})

    transport = httpx.MockTransport(handle)
    if status == 412:
        with pytest.raises(PreconditionFailed, match=r"^change task 't'"):
            call(URL, [use], transport=transport)
    else:
        assert call(URL, [use], transport=transport) == ['"8"' if seen[0].method == "DELETE" else ONE]
    [request] = seen
    assert {name: text for name, text in request.headers.items() if name.startswith("if-")} == headers


@pytest.mark.parametrize("use", [lambda c: c.tasks(), lambda c: c.task("t"), lambda c: c.pin("t")])
@pytest.mark.parametrize("content", [b"", b"{", b"3", b'["a"]'])
def test_an_answer_of_another_shape_is_not_passed_on(call: Calling, use: Use, content: bytes) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    with pytest.raises(ServerError, match=r"^read the answer"):
        call(URL, [use], transport=transport)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.task("../keys"),
        lambda c: c.task("."),
        lambda c: c.delete("t", "../../x"),
        lambda c: c.point("t", "a/b", 1),
        lambda c: c.revoke_key(""),
        lambda c: c.metadata("a?b"),
        lambda c: c.set_tenant("x\n", {}),
    ],
)
def test_no_name_leads_to_another_route(call: Calling, use: Use) -> None:
    with pytest.raises(InputError, match=r"^ask for"):
        call(URL, [use], transport=httpx.MockTransport(lambda request: httpx.Response(500)))


def test_both_clients_have_the_same_calls() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert names(Client) == names(AsyncClient)


WEIGHTS = save({"w": np.arange(100_000, dtype=np.float32)})
CONFIG = b'{"peft_type": "LORA"}'


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    own = Peer()
    with serving(own):
        yield own


def peft(place: Path) -> Path:
    (place / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (place / "adapter_config.json").write_bytes(CONFIG)
    return place


def own_file(place: Path) -> Path:
    (place / "x.safetensors").write_bytes(WEIGHTS)
    return place / "x.safetensors"


def own_directory(place: Path) -> Path:
    (place / "adapter.safetensors").write_bytes(WEIGHTS)
    return place


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (peft, True),
        (lambda place: peft(place) / "adapter_model.safetensors", True),
        (own_file, False),
        (own_directory, False),
    ],
)
def test_adapters_arrive_whole(
    call: Calling, peer: Peer, tmp_path: Path, make: Callable[[Path], Path], config: bool
) -> None:
    path = make(tmp_path)
    found = call(peer.url, [lambda client: client.register("t", path, alias="next")], tenant="acme")
    assert found == [{"task": "t", "query": {"alias": "next", "tenant": "acme"}}]
    assert peer.uploads[-1] == {"weights": WEIGHTS} | ({"config": CONFIG} if config else {})


def pickled(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def pickled_directory(place: Path) -> Path:
    (place / "adapter_config.json").write_bytes(CONFIG)
    (place / "adapter_model.bin").write_bytes(b"PK\3\4")
    return place


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (pickled("a.bin", b"PK\3\4"), "a pickle"),
        (pickled("a.pt", WEIGHTS), "a pickle"),
        (pickled("a.safetensors", b"\x80\x04\x95" + b"." * 100), "another kind of file"),
        (pickled("b.safetensors", b"PK\3\4" + b"." * 100), "another kind of file"),
        (pickled("c.safetensors", b""), "another kind of file, 0 bytes"),
        (pickled_directory, "adapter_model.bin, a pickle"),
        (lambda place: place, "a directory without them"),
        (lambda place: place / "none", "no such path"),
    ],
)
def test_what_is_no_adapter_is_refused_before_anything_is_sent(
    call: Calling, tmp_path: Path, make: Callable[[Path], Path], text: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(FormatError, match=text):
        call("http://127.0.0.1:1", [lambda client: client.register("t", path)])


class Sink(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Counts what is sent, and keeps none of it."""

    def __init__(self) -> None:
        self.size = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        self.size = sum(len(chunk) for chunk in request.stream)
        return httpx.Response(201, json={"size": self.size})

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self.size = sum([len(chunk) async for chunk in request.stream])
        return httpx.Response(201, json={"size": self.size})


def large(place: Path) -> Path:
    path = place / "large.safetensors"
    with path.open("wb") as file:
        file.write(b"\x02" + b"\0" * 7 + b"{}")
        file.truncate(1 << 26)
    return path


def test_an_upload_takes_no_memory(call: Calling, tmp_path: Path) -> None:
    path, sink = large(tmp_path), Sink()
    tracemalloc.start()
    call(URL, [lambda client: client.register("t", path)], transport=sink)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 << 26 < sink.size < (1 << 26) + 1000
    assert peak < 1 << 23


def test_a_file_that_shrinks_while_it_is_sent_is_not_filled_up(call: Calling, tmp_path: Path) -> None:
    path = large(tmp_path)

    class Shrinking(Sink):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            path.write_bytes(b"short")
            return super().handle_request(request)

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            path.write_bytes(b"short")
            return await super().handle_async_request(request)

    with pytest.raises(FormatError, match=r"became shorter"):
        call(URL, [lambda client: client.register("t", path)], transport=Shrinking())


def test_without_httpx_the_extra_is_named_and_the_rest_works() -> None:
    code = """
import sys
sys.modules["httpx"] = None
import tpeft_deploy
tpeft_deploy.Adapter
try:
    tpeft_deploy.Client
except tpeft_deploy.TpeftError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("MissingExtra load the client: expected httpx to be installed")
    assert "pip install 'tpeft-deploy[client]'" in done.stdout


def test_the_blocking_client_is_made_of_the_asynchronous_one() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "unasync.py"), "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
