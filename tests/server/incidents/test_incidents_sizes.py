"""Incidents 7 and 14, of the table in test_incidents.py: small requests that take much, and names without end."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import select
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import grpc
import httpx
import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.server.audited import Audited, Told, audited, infer_message, tree
from tests.helpers.server.v2_bodies import RAW, framed, tensor
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.tucker import TuckerDelta

T = TypeVar("T")
MIB = 1 << 20
LIMIT = 4 * MIB
SERIES = 6


@pytest.fixture(scope="module")
def server(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, others: list[Adapter]) -> Iterator[Audited]:
    limits = {"max_body_bytes": LIMIT, "max_upload_bytes": LIMIT, "max_elements": MIB, "max_queue_rows": 64}
    with audited(conv_bundle, tmp_path_factory.mktemp("sizes"), **limits, max_task_series=SERIES) as found:
        assert found.register(others[0]).status_code == 200
        assert found.register(others[1], tenant="rival").status_code == 200
        for _ in range(3):  # what a first request leaves behind is no growth
            assert found.ask("POST", "/v2/models/mood/infer", json={"inputs": [tensor()]}).status_code == 200
        yield found
        found.check_conduct()
        assert not list((found.state / "incoming").iterdir())
        assert not list((found.place / "temporary").glob("tmp*"))


def growth(server: Audited, work: Callable[[], T]) -> tuple[int, T]:
    """How many bytes more than before the server had in memory at most, and what came of the work."""
    server.forget_peak()
    before = server.memory()
    found = work()
    return server.memory(peak=True) - before, found


SHAPES = [
    [1 << 40, 1 << 40], [1 << 32, 1 << 32], [1 << 62, 4], [1 << 63], [(1 << 63) + 1, 2], [0, 1 << 63], [1 << 70],
    [MIB + 1], [1] * 33, [65536] * 4, [1, 1, 12, 14, 1 << 61],
]  # fmt: skip
SIZES = [-8, -1, 671, 673, 1 << 31, 1 << 63, 1 << 70, 672.0, True, "672", None]


def test_incident_7_sizes_that_lie(server: Audited) -> None:
    def ask() -> None:
        for size in SIZES:
            own = framed({"inputs": [{**RAW, "parameters": {"binary_data_size": size}}]}, bytes(672))
            assert server.ask("POST", "/v2/models/mood/infer", **own).status_code == 400, size
        for shape in SHAPES:
            for datatype in ("FP32", "FP64", "BYTES", "BOOL"):
                one = {**RAW, "shape": shape, "datatype": datatype}
                for document in ({"inputs": [one]}, {"inputs": [{**one, "parameters": {}, "data": [1.0]}]}):
                    raw = bytes(672) if "data" not in document["inputs"][0] else b""
                    own = framed(document, raw)
                    assert server.ask("POST", "/v2/models/mood/infer", **own).status_code in {400, 413}, document
                if all(size < 1 << 63 for size in shape):
                    message = pb.ModelInferRequest(model_name="mood", raw_input_contents=[bytes(672)])
                    message.inputs.add(name="pixels", datatype=datatype, shape=shape)
                    assert server.call("ModelInfer", message).status in {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
        for length in ("-1", "-0", "0x10", "1e3", str(1 << 63), "9" * 40, "", "1_0", "+5", "٣"):
            own = framed({"inputs": [RAW]}, bytes(672))
            own["headers"]["Inference-Header-Content-Length"] = length.encode()
            assert server.ask("POST", "/v2/models/mood/infer", **own).status_code == 400, length
        many = {"inputs": [RAW] * 5000}
        assert server.ask("POST", "/v2/models/mood/infer", json=many).status_code == 413
        deep = b'{"inputs":' + b"[" * MIB
        assert server.ask("POST", "/v2/models/mood/infer", content=deep).status_code in {400, 413}
        strings = framed({"inputs": [{**RAW, "datatype": "BYTES", "shape": [168]}]}, b"\xff" * 672)
        assert server.ask("POST", "/v2/models/mood/infer", **strings).status_code == 400

    more, _ = growth(server, ask)
    assert more < 48 * MIB
    answer = server.ask("POST", "/v2/models/mood/infer", json={"inputs": [tensor()]})
    assert answer.status_code == 200


def bomb(kind: str, size: int) -> bytes:
    """Zeros that take a thousandth of their size."""
    stream = zlib.compressobj(9, zlib.DEFLATED, 31 if kind == "gzip" else 15)
    return b"".join(stream.compress(bytes(MIB)) for _ in range(size // MIB)) + stream.flush()


@pytest.mark.parametrize("kind", ["gzip", "deflate"])
def test_incident_7_bombs_are_not_unpacked(server: Audited, kind: str) -> None:
    small = bomb(kind, 128 * MIB)
    assert len(small) < MIB
    own: dict[str, Any] = {"content": small, "headers": {"Content-Encoding": kind}}
    for path in ("models/mood/infer", "repository/index", "repository/models/mood/load", "repository/models/x/unload"):
        more, answer = growth(server, partial(server.ask, "POST", f"/v2/{path}", **own))
        assert more < 6 * LIMIT, path
        assert answer.status_code == 413, answer.text
    upload = server.ask("POST", "/v2/registry/tasks/mood/versions", **own)
    assert upload.status_code == 501
    twice: dict[str, Any] = {"content": gzip.compress(small), "headers": {"Content-Encoding": f"{kind}, gzip"}}
    assert server.ask("POST", "/v2/models/mood/infer", **twice).status_code == 501


def test_incident_7_bombs_are_not_unpacked_over_grpc(server: Audited) -> None:
    send = partial(server.call, "ModelInfer", bytes(128 * MIB), compression=grpc.Compression.Gzip)
    more, told = growth(server, send)
    assert more < 6 * LIMIT
    assert told.status == "RESOURCE_EXHAUSTED"


def endless(server: Audited, head: str, piece: bytes, most: int) -> tuple[bytes, int]:
    """What is answered to a request that never ends, and how much of it was sent until then."""
    sent = 0
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=100)) as client:
        client.sendall(head.encode())
        try:
            while sent < most and not select.select([client], [], [], 0)[0]:  # until there is an answer, or an end
                # One that reads no more answers first: whichever comes.
                if client in select.select([client], [client], [], 100)[1]:
                    sent += client.send(piece)
        except OSError:
            pass
        answer = b""
        try:
            while not _is_whole(answer) and (part := client.recv(65536)):
                answer += part
        except OSError:
            pass
        return answer, sent


def _is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return length is not None and len(body) >= int(length[1])


def chunked(method: str, path: str, more: str) -> str:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{more}Transfer-Encoding: chunked\r\n\r\n"


CHUNK = b"%x\r\n%s\r\n" % (1 << 16, bytes(1 << 16))


@pytest.mark.parametrize(
    ("path", "more", "start"),
    [
        ("/v2/models/mood/infer", "", b""),
        ("/v2/repository/index", "", b""),
        ("/v2/registry/tasks/mood/versions", "", b""),
        (
            "/v2/registry/tasks/mood/versions",
            "Content-Type: multipart/form-data; boundary=b\r\n",
            b'--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n',
        ),
        (
            "/v2/registry/tasks/mood/versions",
            "Content-Type: multipart/form-data; boundary=b\r\n",
            b'--b\r\nContent-Disposition: form-data; name="weights"\r\n\r\n',
        ),
    ],
)
def test_incident_7_bodies_without_end(server: Audited, path: str, more: str, start: bytes) -> None:
    before = tree(server.state)
    head = chunked("POST", path, more + f"Authorization: {server.headers()['Authorization']}\r\n")
    head += f"{len(start):x}\r\n{start.decode()}\r\n" if start else ""
    grown, (answer, _) = growth(server, partial(endless, server, head, CHUNK, 64 * MIB))
    assert grown < 6 * LIMIT
    assert answer.split(b" ")[1] in {b"413", b"400"}, answer
    grown, (answer, _) = growth(server, partial(endless, server, chunked("POST", path, more), CHUNK, 64 * MIB))
    assert grown < 4 * MIB
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert tree(server.state) == before
    assert server.ask("GET", "/v2").status_code == 200


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        ("GET /v2 HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 10_000),
        ("GET /v2 HTTP/1.1\r\nHost: x\r\nName: ", b"a" * (1 << 16)),
        ("GET /v2 HTTP/1.1\r\n", b"a" * (1 << 16)),
        ("GET /v2/", b"a" * (1 << 16)),
        ("POST /v2/models/mood/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"a" * (1 << 16)),
        ("POST /v2/models/mood/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 9999),
    ],
)
def test_incident_7_headers_without_end(server: Audited, head: str, piece: bytes) -> None:
    grown, (answer, sent) = growth(server, partial(endless, server, head, piece, 64 * MIB))
    assert grown < 4 * MIB
    # The system may throw the answer away, as more came than was read; and who has no key may be told that first.
    assert answer == b"" or re.match(rb"HTTP/1.1 4(31|00|01) ", answer)
    assert sent < 8 * MIB
    assert server.ask("GET", "/v2").status_code == 200


def test_incident_7_more_headers_than_anybody_sends(server: Audited) -> None:
    for count, expected in ((100, b"HTTP/1.1 401 "), (200, b"HTTP/1.1 431 "), (20_000, b"HTTP/1.1 431 ")):
        own = "".join(f"name-{number}: {number}\r\n" for number in range(count))
        answer, _ = endless(server, f"GET /v2 HTTP/1.1\r\nHost: here\r\n{own}\r\n", b"", 0)
        assert answer.startswith(expected), (count, answer)
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}
    # A head of more than one packet, with what cookies and tokens need, is none of that.
    assert server.ask("GET", "/v2", headers={"X-Request-Id": "a" * 30_000}).status_code == 200


def big(rows: int) -> dict[str, Any]:
    pixels = np.resize(PIXELS, (rows, 1, 12, 14))
    one = {**RAW, "shape": list(pixels.shape), "parameters": {"binary_data_size": pixels.nbytes}}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}]
    return framed({"inputs": [one], "outputs": outputs}, pixels.tobytes())


def test_incident_7_a_full_queue_says_when_to_come_again(server: Audited) -> None:
    """To the tenant that fills its share, and to nobody else; what never fits is refused for good."""
    small: dict[str, Any] = {"json": {"inputs": [tensor()]}}
    before = server.ask("POST", "/v2/models/mood/infer", **small).json()
    beyond = server.ask("POST", "/v2/models/mood/infer", **big(6000))
    assert (beyond.status_code, "retry-after" in beyond.headers) == (413, False)
    assert server.ask("POST", "/v2/models/mood/infer", **big(32)).status_code == 200
    refused: list[httpx.Response] = []
    told: list[Told] = []
    with ThreadPoolExecutor(6) as pool:
        until = time.monotonic() + 200
        while not (refused and told) and time.monotonic() < until:
            full = [pool.submit(server.ask, "POST", "/v2/models/mood/infer", **big(32)) for _ in range(12)]
            while not all(one.done() for one in full):
                call = server.call("ModelInfer", infer_message("mood"))
                told += [call] if call.status != "OK" else []
                assert server.ask("POST", "/v2/models/mood/infer", "rival", **small).status_code == 200
                assert server.call("ModelInfer", infer_message("mood"), "rival").status == "OK"
            answers = [one.result() for one in full]
            refused += [one for one in answers if one.is_error]
    # Its share is full; or the queue is, of which it has most when the neighbour comes.
    assert {(one.status_code, one.headers["retry-after"]) for one in refused} <= {(429, "1"), (503, "1")}
    assert {(one.status, one.trailers["retry-after"]) for one in told} <= {
        ("RESOURCE_EXHAUSTED", "1"),
        ("UNAVAILABLE", "1"),
    }
    after = server.ask("POST", "/v2/models/mood/infer", **small).json()
    assert after == before


def test_incident_7_a_quota_says_when_to_come_again(server: Audited) -> None:
    path = "/v2/admin/tenants/rival"
    try:
        assert server.ask("PUT", path, "operator", "admin", json={"requests_per_s": 0.2}).status_code == 200
        first, *others = (
            server.ask("POST", "/v2/models/base/infer", "rival", json={"inputs": [tensor()]}) for _ in range(4)
        )
        assert first.status_code == 200
        assert {one.status_code for one in others} == {429}
        assert {one.headers["retry-after"] for one in others} <= {"4", "5"}
        told = server.call("ModelInfer", infer_message("base"), "rival")
        assert told.status == "RESOURCE_EXHAUSTED"
        assert told.trailers["retry-after"] in {"4", "5"}
        assert server.ask("POST", "/v2/models/base/infer", json={"inputs": [tensor()]}).status_code == 200
    finally:
        assert server.ask("PUT", path, "operator", "admin", json={}).status_code == 200


def test_incident_14_quotas_of_what_is_stored(server: Audited) -> None:
    """What exceeds them leaves nothing on the disk, however many come at once."""
    module = nets.conv_net()[0]
    own = [nets.adapter_for(module, {"up.weight": (2, 2)}, seed=100 + number) for number in range(8)]
    size = len(own[0].to_bytes())
    stored = tree(server.state)
    listed = server.ask("GET", "/v2/admin/tenants", "operator", "admin").json()
    used = next(one["used"] for one in listed if one["name"] == "acme")
    try:
        for quota in ({"adapters": used["adapters"] + 2}, {"bytes": used["bytes"] + 2 * size + size // 2}):
            server.ask("PUT", "/v2/admin/tenants/acme", "operator", "admin", json=quota)
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda number: server.register(own[number], f"stored-{number}"), range(8)))
            assert sorted(one.status_code for one in answers) == [200] * 2 + [429] * 6
            # Waiting helps nobody here: something has to be deleted first.
            assert not any("retry-after" in one.headers for one in answers)
            assert server.register(own[7], "stored-9").status_code == 429
            stored |= stored_as(*(own[number] for number, one in enumerate(answers) if not one.is_error))
            assert tree(server.state) == stored
            for number, one in enumerate(answers):
                path = f"/v2/registry/tasks/stored-{number}"
                assert server.ask("GET", path).status_code == (404 if one.is_error else 200)
                if not one.is_error:
                    assert server.ask("DELETE", path).status_code == 200
    finally:
        server.ask("PUT", "/v2/admin/tenants/acme", "operator", "admin", json={})


def stored_as(*adapters: Adapter) -> dict[str, str]:
    """The files that adapters are kept in, as `tree` shows them."""
    digests = [hashlib.sha256(one.to_bytes()).hexdigest() for one in adapters]
    return {f"blobs/{digest[:2]}/{digest}.safetensors": digest for digest in digests}


def test_incident_14_refused_uploads_are_not_stored(server: Audited) -> None:
    module = nets.conv_net()[0]
    right = nets.adapter_for(module, {"up.weight": (2, 2)}, seed=1)
    zero = TuckerDelta(np.zeros((2, 2), np.float32), right.deltas["up.weight"].factors, 1.0)
    before = tree(server.state)
    for seed in range(20):
        factors = nets.adapter_for(module, {"up.weight": (2, 2)}, seed=seed).deltas["up.weight"].factors
        nothing = Adapter({"up.weight": TuckerDelta(zero.core, factors, 1.0)}, {}, right.base_digests)
        answer = server.register(nothing, "nothing")
        assert answer.status_code == 400
        assert "differ from the base's" in answer.text
    large = server.ask("POST", "/v2/registry/tasks/large/versions", content=bytes(LIMIT + 1))
    assert large.status_code == 413
    assert tree(server.state) == before


def test_incident_14_names_that_clients_make_up_are_not_kept(server: Audited) -> None:
    """Neither as series of metrics nor in memory: names of models, of requests, and keys; nor are many tenants."""
    small = {"inputs": [tensor()]}
    module = nets.conv_net()[0]
    names = [f"many-{number}" for number in range(2 * SERIES)]
    for number, name in enumerate(names):
        assert server.register(nets.adapter_for(module, {"up.weight": (1, 1)}, seed=number), name).status_code == 200
        assert server.ask("POST", f"/v2/models/{name}/infer", json=small).status_code == 200
        own = {"tenant": f"tenant-{number}", "role": "infer"}
        key = server.ask("POST", "/v2/admin/keys", "operator", "admin", json=own).json()["key"]
        headers = {"Authorization": f"Bearer {key}"}
        assert server.ask("POST", "/v2/models/base/infer", json=small, headers=headers).status_code == 200

    def make_up(begin: int, count: int) -> None:
        for number in range(begin, begin + count):
            own = {**server.headers(), "X-Request-Id": f"request-{number}", f"X-{number}": "1"}
            assert server.client.get(f"/v2/models/made-up-{number}", headers=own).status_code == 404
            assert server.client.post(f"/v2/models/made-up-{number}/infer", headers=own, json=small).status_code == 404
            assert server.client.get(f"/made/up/{number}", headers=own).status_code == 404
            key = f"Bearer tpk_{number:012x}_{'a' * 43}"
            assert server.client.get("/v2", headers={"Authorization": key}).status_code == 401
        for number in range(begin, begin + count // 10):
            assert server.call("ModelReady", pb.ModelReadyRequest(name=f"made-up-{number}")).status == "NOT_FOUND"
            assert server.call(f"/made.Up/Number{number}").status == "UNIMPLEMENTED"

    make_up(0, 40)
    series(server)
    before, memory = series(server), server.memory()
    make_up(40, 300)
    assert series(server) == before
    assert server.memory() - memory < 4 * MIB
    tasks = {line for line in before if line.startswith("tpeft_rows_total")}
    assert len(tasks) <= SERIES + 1
    assert 'tpeft_rows_total{task="other",tenant=""}' in tasks
    assert "made" not in str(before)
    for name in names:
        assert server.ask("DELETE", f"/v2/registry/tasks/{name}").status_code == 200


def series(server: Audited) -> set[str]:
    """Metrics by name and labels, without the list of what is resident."""
    text = server.ask("GET", "/metrics", "operator", "admin").text
    found = {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    return {line for line in found if not line.startswith("tpeft_resident")}
