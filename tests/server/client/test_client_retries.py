"""When a call is sent again, when it is not, and which error it ends in; time and the network are replaced."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.helpers.server.client_calls import BOTH, Calling, Hours, Use
from tpeft_deploy import AsyncClient, Client, errors
from tpeft_deploy.client.answers import retry_after
from tpeft_deploy.runtime.server.v2.statuses import status_of

URL = "http://server:1"
X = np.ones((1, 1), np.float32)


@pytest.fixture(params=BOTH)
def call(request: pytest.FixtureRequest) -> Calling:
    return BOTH[request.param]


Step = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Network:
    """Answers one step after the other, the last one for good."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._handle)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, httpx.ConnectError):
            step.request = request
        if isinstance(step, Exception):
            raise step
        if isinstance(step, httpx.Response):
            return httpx.Response(step.status_code, headers=step.headers, content=step.content)
        return step(request)


def refused(status: int, text: str = "no", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": text}, headers={k.replace("_", "-"): v for k, v in headers.items()})


def done() -> httpx.Response:
    head = {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [2.0]}]}
    return httpx.Response(200, json=head)


def infer(**asked: Any) -> Use:
    return lambda client: client.infer({"x": X}, "t", **asked)


def go(call: Calling, network: Network, hours: Hours, *uses: Use, **settings: Any) -> list[Any]:
    return call(URL, uses or [infer()], hours, transport=network.transport, **settings)


NO_CONNECTION = httpx.ConnectError("[Errno 111] Connection refused")


@pytest.mark.parametrize("step", [refused(429, Retry_After="2"), refused(503, Retry_After="2")], ids=["429", "503"])
def test_the_servers_time_is_waited_for(call: Calling, step: Step) -> None:
    network, hours = Network(step, step, done()), Hours(chance=0.5)
    (answer,) = go(call, network, hours)
    assert answer["y"].tolist() == [2.0]
    assert hours.slept == [2.25, 2.25]  # never sooner than it said, and not all at once


@pytest.mark.parametrize("step", [refused(503), NO_CONNECTION], ids=["503 without a time", "no connection"])
def test_without_a_time_waits_grow(call: Calling, step: Step) -> None:
    network, hours = Network(step, step, step, done()), Hours(chance=0.5)
    go(call, network, hours)
    assert hours.slept == pytest.approx([0.075, 0.15, 0.3])


def test_the_time_that_is_left_is_sent_with_each_attempt(call: Calling) -> None:
    network, hours = Network(refused(503, Retry_After="3"), done()), Hours()
    go(call, network, hours, infer(timeout=10))
    heads = [json.loads(r.content[: int(r.headers["Inference-Header-Content-Length"])]) for r in network.requests]
    assert [head["parameters"]["timeout"] for head in heads] == [10_000_000, 7_000_000]
    assert [request.extensions["timeout"]["read"] for request in network.requests] == [10, 7]


def test_asking_about_the_bundle_takes_of_the_same_time(call: Calling) -> None:
    def about(request: httpx.Request) -> httpx.Response:
        hours.time += 1
        return httpx.Response(200, json={"bundle": "toy", "inputs": [], "outputs": []})

    hours = Hours()
    network = Network(about, about, done())
    go(call, network, hours, lambda client: client.infer({"x": X}, tasks=["a"], timeout=5))
    assert [request.extensions["timeout"]["read"] for request in network.requests] == [5, 4, 3]


@pytest.mark.parametrize("status", [429, 503])
def test_nobody_waits_longer_than_the_call_may_take(call: Calling, status: int) -> None:
    network, hours = Network(refused(status, "full", Retry_After="31")), Hours()
    with pytest.raises(errors.TpeftError, match=r"^full$"):
        go(call, network, hours)
    assert hours.slept == []
    assert len(network.requests) == 1


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_after_so_many_retries_the_last_refusal_is_raised(call: Calling, retries: int) -> None:
    network, hours = Network(refused(429, "too much", Retry_After="1")), Hours()
    with pytest.raises(errors.QuotaExceeded, match=r"^too much$") as caught:
        go(call, network, hours, retries=retries)
    assert caught.value.retry_after == 1
    assert len(network.requests) == retries + 1


def test_a_quota_without_a_time_is_not_asked_again(call: Calling) -> None:
    network, hours = Network(refused(429, "ten adapters")), Hours()
    with pytest.raises(errors.QuotaExceeded) as caught:
        go(call, network, hours)
    assert caught.value.retry_after is None
    assert len(network.requests) == 1


CHANGES: list[Use] = [
    lambda client: client.point("t", "current", 2),
    lambda client: client.rollback("t"),
    lambda client: client.delete("t"),
    lambda client: client.publish("t", "acme"),
    lambda client: client.pin("t"),
    lambda client: client.unpin("t"),
    lambda client: client.create_key("acme", "infer"),
    lambda client: client.revoke_key("id"),
    lambda client: client.set_tenant("acme", {"weight": 2}),
]


def lost() -> list[Step]:
    return [
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
    ]


@pytest.mark.parametrize("use", CHANGES)
def test_a_change_is_sent_again_only_when_there_was_no_connection(call: Calling, use: Use) -> None:
    for step in [refused(503, Retry_After="1"), refused(429, Retry_After="1"), *lost()]:
        network, hours = Network(step), Hours()
        with pytest.raises(errors.TpeftError):
            go(call, network, hours, use)
        assert len(network.requests) == 1
    network, hours = Network(NO_CONNECTION, httpx.Response(200, json={})), Hours()
    go(call, network, hours, use)
    assert len(network.requests) == 2


def test_an_upload_is_sent_again_whole_when_there_was_no_connection(call: Calling, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x02" + b"\0" * 7 + b"{}" + b"w" * 300_000)
    network, hours = Network(NO_CONNECTION, httpx.Response(201, json={"version": "1"})), Hours()
    assert go(call, network, hours, lambda client: client.register("t", path)) == [{"version": "1"}]
    first, second = network.requests
    assert second.content == first.content
    assert path.read_bytes() in second.content
    assert len(second.content) == int(second.headers["Content-Length"])


@pytest.mark.parametrize("use", [infer(), lambda client: client.tasks()])
def test_what_may_have_been_done_is_not_sent_again(call: Calling, use: Use) -> None:
    for step in lost():
        network, hours = Network(step), Hours()
        with pytest.raises(errors.Unavailable, match=r"the connection was lost"):
            go(call, network, hours, use)
        assert len(network.requests) == 1


def test_a_certificate_that_is_not_trusted_stays_so(call: Calling) -> None:
    error = httpx.ConnectError("certificate verify failed")
    error.__cause__ = ssl.SSLCertVerificationError()
    network, hours = Network(error), Hours()
    with pytest.raises(errors.Unavailable, match=r"no connection to server:1: certificate verify failed"):
        go(call, network, hours)
    assert len(network.requests) == 1


@pytest.mark.parametrize("step", [httpx.ReadTimeout("slow"), httpx.ConnectTimeout("slow"), httpx.PoolTimeout("slow")])
def test_time_over_is_a_deadline(call: Calling, step: Step) -> None:
    network, hours = Network(step), Hours()
    with pytest.raises(errors.DeadlineExceeded, match=r"^run task 't': expected an answer within 30 s, got none$"):
        go(call, network, hours)
    assert len(network.requests) == 1


def test_a_call_without_time_is_not_sent(call: Calling) -> None:
    network = Network(done())
    with pytest.raises(errors.DeadlineExceeded):
        go(call, network, Hours(), infer(timeout=0))
    assert not network.requests


class Trickle(httpx.AsyncByteStream, httpx.SyncByteStream):
    """Bytes that come so slowly that no single wait is long; a client on an event loop reads that loop's clock."""

    def __init__(self, hours: Hours) -> None:
        self.hours = hours

    def __iter__(self) -> Any:
        while True:
            self.hours.clock.sleep(0.02)
            yield b" "

    async def __aiter__(self) -> Any:
        while True:
            await asyncio.sleep(0.02)
            yield b" "


def test_an_answer_that_trickles_ends_with_the_time_of_the_call(call: Calling) -> None:
    hours = Hours()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Trickle(hours)))
    with pytest.raises(errors.DeadlineExceeded):  # it never ends otherwise
        call(URL, [infer(timeout=0.2)], hours, transport=transport)
    assert len(hours.slept) <= 11


REFUSALS: Sequence[tuple[errors.TpeftError, type[errors.TpeftError]]] = [
    (errors.ProtocolError("read", expected="JSON"), errors.InputError),
    (errors.InputError("run", expected="float32", got="float64"), errors.InputError),
    (errors.FormatError("register"), errors.InputError),
    (errors.TooLarge("read"), errors.TooLarge),
    (errors.Unauthenticated("infer"), errors.Unauthenticated),
    (errors.Forbidden("infer"), errors.Forbidden),
    (errors.NotFound("find"), errors.NotFound),
    (errors.UnknownTask("find"), errors.NotFound),
    (errors.Conflict("register"), errors.Conflict),
    (errors.QuotaExceeded("run", retry_after=1.5), errors.QuotaExceeded),
    (errors.QuotaExceeded("run"), errors.QuotaExceeded),
    (errors.Unsupported("trace"), errors.Unsupported),
    (errors.Unavailable("run a request", problem="draining"), errors.Unavailable),
    (errors.QueueFull("queue a request of 3 rows", expected="at most 2 rows waiting"), errors.QueueFull),
    (errors.CapacityError("load"), errors.Unavailable),
    (errors.DeadlineExceeded("run"), errors.DeadlineExceeded),
    (ZeroDivisionError("secret"), errors.ServerError),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("error", "kind"), REFUSALS, ids=lambda value: type(value).__name__)
def test_refusals_come_back_as_the_errors_they_were(
    call: Calling, error: errors.TpeftError, kind: type[errors.TpeftError]
) -> None:
    status = status_of(error)
    headers = {} if status.retry_after is None else {"Retry_After": str(status.retry_after)}
    with pytest.raises(kind) as caught:
        go(call, Network(refused(status.http, status.text, **headers)), Hours(), retries=0)
    assert type(caught.value) is kind
    assert str(caught.value) == status.text
    assert getattr(caught.value, "retry_after", None) == (status.retry_after if status.http == 429 else None)


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b'["error"]', b'{"error": 3}', b"", b"\xff"])
def test_what_no_server_of_ours_says_is_a_server_error(call: Calling, body: bytes) -> None:
    with pytest.raises(errors.ServerError, match=r"run task 't': expected a server of tpeft_deploy.*got status 502"):
        go(call, Network(httpx.Response(502, content=body)), Hours())


HEAD: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": [1]}


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        ({"outputs": [HEAD | {"parameters": {"binary_data_size": 4}}]}, b"123"),
        ({"outputs": [HEAD | {"parameters": {"binary_data_size": 4}}]}, b"12345"),
        ({"outputs": [HEAD | {"parameters": {"binary_data_size": -4}}]}, b"1234"),
        ({"outputs": [HEAD | {"parameters": {"binary_data_size": True}}]}, b"1"),
        ({"outputs": [HEAD | {"shape": [2], "parameters": {"binary_data_size": 4}}]}, b"1234"),
        ({"outputs": [HEAD | {"shape": [-1], "parameters": {"binary_data_size": 4}}]}, b"1234"),
        ({"outputs": [HEAD | {"datatype": "FP8", "parameters": {"binary_data_size": 1}}]}, b"1"),
        ({"outputs": [HEAD | {"datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}, b"\x02\0\0\0a"),
        ({"outputs": [HEAD | {"datatype": "BYTES", "parameters": {"binary_data_size": 2}}]}, b"\x02\0"),
        ({"outputs": [HEAD | {"data": ["a"]}]}, b""),
        ({"outputs": [HEAD | {"data": [[1], [2, 3]]}]}, b""),
        ({"outputs": [HEAD | {"datatype": "UINT8", "data": [256]}]}, b""),
        ({"outputs": [HEAD | {"parameters": []}]}, b""),
        ({"outputs": {}}, b""),
        ({}, b""),
    ],
)
def test_a_damaged_answer_is_never_taken_for_one(call: Calling, head: dict[str, Any], tail: bytes) -> None:
    first = json.dumps(head).encode()
    answer = httpx.Response(
        200, content=first + tail, headers={"Inference-Header-Content-Length": str(len(first))} if tail else {}
    )
    with pytest.raises(errors.ServerError, match=r"^read "):
        go(call, Network(answer), Hours())


@pytest.mark.parametrize("length", ["-1", "99999", "x", "", "²"])
def test_a_wrong_length_of_the_head_is_refused(call: Calling, length: str) -> None:
    answer = httpx.Response(
        200, content=b"{}", headers=[(b"Inference-Header-Content-Length", length.encode("latin-1"))]
    )
    with pytest.raises(errors.ServerError, match=r"JSON of the answer"):
        go(call, Network(answer), Hours())


def test_times_to_come_again_are_seconds_or_dates() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for stated, seconds in [
        *[("2", 2.0), (" 0.5 ", 0.5), ("-3", 0.0), ("inf", None), ("nan", None), ("soon", None), ("", None)],
        *[("Thu, 01 Jan 2026 00:01:00 GMT", 60.0), ("Thu, 01 Jan 2025 00:01:00 GMT", 0.0)],
        ("Thu, 01 Jan 2026 00:01:00", 60.0),
    ]:
        assert retry_after({"Retry-After": stated}, now) == seconds


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", "", "http://a:b", "unix:/x"])
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(errors.InputError, match=r"^connect to"):
        Client(url)
    with pytest.raises(errors.InputError, match=r"^connect to"):
        AsyncClient(url)


@pytest.mark.parametrize("key", ["a b", "ä", "a\n"])
def test_a_key_that_no_header_holds_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(errors.InputError) as caught:
        Client(URL, key)
    assert key not in str(caught.value)


def test_nobody_listens(call: Calling) -> None:
    with pytest.raises(errors.Unavailable, match=r"no connection to 127.0.0.1:1: "):
        call("http://127.0.0.1:1", [lambda client: client.ready()], retries=1)
