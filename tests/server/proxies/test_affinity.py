"""The documented configurations of nginx and HAProxy in front of three small servers: which server gets what."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from tests.helpers.server.proxies import NAMES, PROXIES, ROOT, documented, running, sockets
from tests.helpers.server.upstreams import Upstream
from tests.helpers.waiting import wait_until
from tpeft_deploy import Client
from tpeft_deploy.client.inference import BundleInfo, InferArguments, infer
from tpeft_deploy.errors import TpeftError

TASKS = [f"task-{number}" for number in range(300)]
SERVICE = "/inference.GRPCInferenceService/"


def client(place: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(place / "front-80.sock"))
    return httpx.Client(base_url="http://proxy", transport=transport, timeout=100)


@dataclass
class Front:
    """A proxy, and the servers behind it."""

    proxy: str
    servers: dict[str, Upstream]
    place: Path
    http: httpx.Client
    channel: grpc.Channel

    def post(self, path: str, task: str | None = None, **given: Any) -> httpx.Response:
        headers = {**({"Tpeft-Task": task} if task is not None else {}), **given.pop("headers", {})}
        return self.http.post(path, headers=headers, **({"content": b"{}"} | given))

    def server_of(self, path: str, task: str | None = None, **given: Any) -> str:
        """Name of the server that answers; 503 and a closed connection are tried again, as clients do."""
        answers: list[httpx.Response] = []

        def answered() -> bool:
            try:
                answers.append(self.post(path, task, **given))
            except httpx.RemoteProtocolError:
                return False
            assert answers[-1].status_code == 200 or answers[-1].headers["Retry-After"] == "1"
            return answers[-1].status_code == 200

        wait_until(answered, "an answer")
        return str(answers[-1].json()["server"])

    def home(self, task: str) -> str:
        return self.server_of(f"/v2/models/{task}/infer")

    def homes(self) -> dict[str, str]:
        return {task: self.home(task) for task in TASKS}

    def rpc(self, task: str | None) -> str:
        metadata = () if task is None else (("tpeft-task", task),)
        data: bytes = self.channel.unary_unary(f"{SERVICE}ModelInfer")(b"", metadata=metadata, timeout=100)
        return data.decode()


@pytest.fixture(scope="module", params=PROXIES)
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    place = Path(tempfile.mkdtemp(prefix="tpeft-proxy-"))  # paths of sockets are short
    servers: dict[str, Upstream] = {}
    try:
        with ExitStack() as stack:
            for name in NAMES:
                servers[name] = Upstream(name, place)
                stack.callback(servers[name].kill)
            stack.enter_context(running(request.param, place, sockets(request.param)))
            http = stack.enter_context(client(place))
            options = [("grpc.default_authority", "proxy")]
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{place / 'front-9000.sock'}", options=options))
            yield Front(request.param, servers, place, http, channel)
    finally:
        shutil.rmtree(place)


def test_each_task_has_one_server_and_tasks_are_spread(front: Front) -> None:
    homes = front.homes()
    assert front.homes() == homes
    shares = Counter(homes.values())
    assert set(shares) == set(NAMES)
    assert all(60 <= count <= 140 for count in shares.values()), shares


def test_versions_components_and_protocols_share_the_server_of_the_task(front: Front) -> None:
    for task in TASKS[:20]:
        home = front.home(task)
        paths = [f"{task}/versions/3/infer", f"{task}@3/infer", f"{task}%403/infer", f"{task}@canary/generate"]
        paths += [f"{task}/text/infer", f"{task}%2Ftext/infer", f"{task}/generate_stream"]
        assert {front.server_of(f"/v2/models/{path}") for path in paths} == {home}
        assert front.server_of("/v1/chat/completions", task) == home
        assert front.server_of("/v1/embeddings", f"{task}@3") == home
        assert front.rpc(task) == front.rpc(f"{task}@3") == front.rpc(f"{task}/text")
        if front.proxy == "haproxy":
            assert front.rpc(task) == home


def test_the_header_goes_before_the_path(front: Front) -> None:
    for number, task in enumerate(TASKS[:20]):
        assert front.server_of(f"/v2/models/{TASKS[-1 - number]}/infer", task) == front.home(task)


def test_the_client_sends_the_task_where_the_path_has_none() -> None:
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(400, json={"error": "it is refused"})

    with Client("http://proxy", transport=httpx.MockTransport(answer)) as own:
        for call in (own.chat, own.generate, own.embed):
            with pytest.raises(TpeftError, match="it is refused"):
                call("a text", "mood@3")
    assert [request.headers["Tpeft-Task"] for request in sent] == ["mood@3"] * 3
    rows = InferArguments({"x": np.zeros((2, 1), np.float32)}, None, ["tone", "mood"], None, 0)
    payload = infer(rows, BundleInfo("net", frozenset(), frozenset())).payload(None)
    assert payload is not None
    assert payload.headers["Tpeft-Task"] == "tone"


def test_requests_without_a_task_go_to_all(front: Front) -> None:
    for path in ("/v2/models/base/infer", "/v1/chat/completions", "/v2/registry/tasks/x/versions"):
        assert {front.server_of(path) for _ in range(50)} == set(NAMES)
    assert {front.server_of("/v1/completions", "") for _ in range(50)} == set(NAMES)
    for task in (None, "base"):
        assert {front.rpc(task) for _ in range(50)} == set(NAMES)


@pytest.mark.parametrize("front", ["haproxy"], indirect=True)
def test_haproxy_finds_the_task_in_a_body(front: Front) -> None:
    for task in TASKS[:20]:
        body = {"messages": [{"role": "user", "content": "x" * 2000}], "model": f"{task}@2"}
        assert front.server_of("/v1/chat/completions", content=None, json=body) == front.home(task)
    body = {"model": TASKS[0], "input": "x" * (1 << 20)}  # more than is looked at
    assert front.server_of("/v1/embeddings", content=None, json=body) in NAMES


def test_requests_come_as_they_were_sent(front: Front) -> None:
    given = {"Authorization": "Bearer a", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "X-Forwarded-For": "192.0.2.1"}
    answer = front.post("/v2/models/a%2Bb@3/infer?x=%20", headers={**given, "Inference-Header-Content-Length": "2"})
    facts = answer.json()
    assert facts["path"] == "/v2/models/a%2Bb@3/infer?x=%20"
    headers = {name.lower(): value for name, value in facts["headers"].items()}
    assert headers["authorization"] == "Bearer a"
    assert headers["traceparent"] == given["traceparent"]
    assert headers["inference-header-content-length"] == "2"
    assert headers["host"] == "proxy"
    assert headers["x-forwarded-for"].startswith("192.0.2.1")
    assert headers["x-forwarded-proto"] == "http"


def test_events_come_before_their_stream_ends(front: Front) -> None:
    server = front.servers[front.home("talk")]
    server.release.clear()
    headers = {"X-Test": "streams"}
    with front.http.stream("POST", "/v2/models/talk/generate_stream", content=b"{}", headers=headers) as answer:
        parts = answer.iter_raw()
        assert next(parts) == b"data: first\n\n"
        server.release.set()
        assert b"".join(parts) == b"data: last\n\n"


@pytest.mark.parametrize("path", ["/v2/registry/tasks/a/versions", "/v2/models/a/infer"])
def test_bodies_are_passed_on_while_they_come(front: Front, path: str) -> None:
    part, count = b"x" * (1 << 20), 12

    def parts() -> Iterator[bytes]:
        for server in front.servers.values():
            server.came = 0
        yield part
        wait_until(lambda: any(server.came > len(part) // 2 for server in front.servers.values()), "its first part")
        for _ in range(count - 1):
            yield part

    answer = front.post(path, content=parts(), headers={"Content-Length": str(count * len(part))})
    assert answer.json()["came"] == count * len(part)


def test_refusals_are_passed_on(front: Front) -> None:
    before = sum(server.asked for server in front.servers.values())
    for _ in range(5):
        answer = front.post("/v2/models/a/infer", headers={"X-Test": "busy"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert sum(server.asked for server in front.servers.values()) == before + 5
    assert len({front.home("a") for _ in range(5)}) == 1  # its server stays on the ring


def test_a_request_with_a_server_that_dies_is_not_sent_again(front: Front) -> None:
    before = sum(server.asked for server in front.servers.values())
    with client(front.place) as own:  # after a first request, HAProxy may close the connection and say nothing
        answer = own.post("/v2/models/a/infer", content=b"{}", headers={"X-Test": "dies"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "Send it again." in answer.json()["error"]
    assert sum(server.asked for server in front.servers.values()) == before + 1


def test_only_the_tasks_of_a_lost_server_move_until_it_is_back(front: Front) -> None:
    homes = front.homes()
    over_grpc = {task: front.rpc(task) for task in TASKS[:60]}
    front.servers["two"].kill()
    try:
        moved = front.homes()
        assert all(moved[task] == home for task, home in homes.items() if home != "two")
        assert {moved[task] for task, home in homes.items() if home == "two"} == {"one", "three"}
        for task, home in over_grpc.items():
            assert front.rpc(task) == home or home == "two"
    finally:
        front.servers["two"].start()
    wait_until(lambda: "two" in front.homes().values(), "its return")
    assert front.homes() == homes
    wait_until(lambda: {task: front.rpc(task) for task in over_grpc} == over_grpc, "its return for gRPC")


@pytest.mark.parametrize("front", ["haproxy"], indirect=True)
def test_haproxy_sends_nothing_to_a_server_that_drains(front: Front) -> None:
    homes = front.homes()
    front.servers["one"].ready = False
    try:
        wait_until(lambda: "one" not in front.homes().values(), "that it gets none")
        moved, asked = front.homes(), front.servers["one"].asked
        assert all(moved[task] == home for task, home in homes.items() if home != "one")
        assert {front.rpc(task) for task in TASKS[:60]} == {"two", "three"}
        assert {front.server_of("/v2/registry/tasks/x/versions") for _ in range(20)} == {"two", "three"}
        assert front.servers["one"].asked == asked
    finally:
        front.servers["one"].ready = True
    wait_until(lambda: front.homes() == homes, "its return")


def test_messages_of_a_grpc_stream_are_passed_on_while_it_is_open(front: Front) -> None:
    said = iter([b"1", b"2", b"3"])
    answers: list[bytes] = []

    def messages() -> Iterator[bytes]:
        for number, message in enumerate(said):
            wait_until(lambda: len(answers) >= number, "the answer to the last")  # noqa: B023
            yield message

    metadata = [("tpeft-task", "talk")]
    call = front.channel.stream_stream(f"{SERVICE}ModelStreamInfer")
    for answer in call(messages(), metadata=metadata, timeout=100):
        answers.append(answer)  # noqa: PERF402
    name = front.rpc("talk").encode()
    assert answers == [name + b"1", name + b"2", name + b"3"]


@pytest.mark.parametrize("proxy", PROXIES)
def test_the_page_has_the_files_as_they_are(proxy: str) -> None:
    assert documented(proxy).read_text() in (ROOT / "docs" / "many-machines.md").read_text()
