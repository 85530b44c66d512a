"""Requests that a proxy before this server may read in another way are refused, and nothing behind them is read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.server.audited import Audited
from tpeft_deploy.runtime.server.rest.app import _asked, application, model_of

LATER = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
REFUSED: dict[str, bytes] = {
    "two hosts": b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "the same host twice": b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nhOST: x\r\n\r\n",
    "two hosts in 1.0": b"GET /v2/health/live HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET /v2/health/live HTTP/1.1\r\n\r\n",
    "chunked 1.0": b"POST /v2 HTTP/1.0\r\nHost: x\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "chunked 1.0, connection kept": b"POST /v2 HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n"
    + CHUNKED
    + b"\r\n0\r\n\r\n",
    "chunked and a length": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "a length and chunked": b"POST /v2 HTTP/1.1\r\nHost: x\r\n" + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\n",
    "two equal lengths": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "lengths in a list": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 0\r\n\r\n",
    "a signed length": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n",
    "another coding": b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding before chunked": b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n"
    + CHUNKED
    + b"\r\n0\r\n\r\n",
    "a space before the colon": b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded line": b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
    "HTTP 0.9": b"GET /v2/health/live HTTP/0.9\r\nHost: x\r\n\r\n",
    "HTTP 2.0": b"GET /v2/health/live HTTP/2.0\r\nHost: x\r\n\r\n",
    "two types": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Type: a/b\r\n\r\n",
    "two encodings": b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Encoding: identity\r\n\r\n",
    "two lengths of JSON": b"POST /v2 HTTP/1.1\r\nHost: x\r\n"
    + 2 * b"Inference-Header-Content-Length: 1\r\n"
    + b"\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_with_two_meanings_ends_its_connection(server: Audited, name: str) -> None:
    answer = server.raw(REFUSED[name] + LATER)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1, "what follows is not read"


@pytest.mark.parametrize(
    "head", [b"GET %b HTTP/1.1\r\nHost: x\r\n", b"GET %b HTTP/1.0\r\n", b"GET http://x%b HTTP/1.1\r\nHost: x\r\n"]
)
def test_plain_requests_are_answered(server: Audited, head: bytes) -> None:
    assert server.raw(head % b"/v2/health/live" + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_two_keys_are_none(server: Audited) -> None:
    good = server.keys["acme", "deploy"]
    key = f"Authorization: Bearer {good}\r\n"
    for line in ("GET /v2", "POST /v2/models/mood/infer"):
        for both in (key + key, key + "Authorization: Bearer x\r\n", "authorization: Basic x\r\n" + key):
            answer = server.raw(f"{line} HTTP/1.1\r\nHost: x\r\n{both}Connection: close\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 401 "), answer
            assert b"www-authenticate: Bearer" in answer
    assert server.raw(f"GET /v2 HTTP/1.1\r\nHost: x\r\n{key}Connection: close\r\n\r\n".encode())[9:12] == b"200"


def test_trailers_are_no_headers(server: Audited) -> None:
    key = f"Authorization: Bearer {server.keys['acme', 'deploy']}\r\n"
    head = f"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n{CHUNKED.decode()}Connection: close\r\n"
    assert server.raw(f"{head}\r\n0\r\n{key}\r\n".encode())[9:12] == b"401"
    assert server.raw(f"{head}{key}\r\n0\r\nX-Request-Id: x\r\n\r\n".encode())[9:12] == b"200"


ENCODED = [
    "/v2%2Fmodels/mood/infer", "/v2%2fmodels/mood/infer", "/v2/models%2fmood/infer", "/v2/models/mood%2finfer",
    "/v2/mod%65ls/mood/infer", "/%76%32/models/mood/infer", "/v2/models/mood/inf%65r", "/v2/models/mood%2Fx/infer",
    "/v2/models/%2e%2e/infer", "/v2/models/%2e/infer", "/v2/models/mood/%76ersions/1/infer", "/%2e/v2/models/x/infer",
    "/v2/models/mood/versions/1%2finfer", "/v2/models/x/%2e%2e/mood/infer", "/v2/%72egistry/tasks/mood",
    "/v2/registry%2ftasks/mood", "/v2/registry/tasks/a%2fb", "/v2/admin%2ftenants/x", "/v2/admin/%6beys", "/metric%73",
    "/v2/models/mood/infer%0a", "/v2/models/mood/infer%00", "/v2/models/mood/infer%20",
]  # fmt: skip


def test_fixed_parts_of_a_path_come_literally(server: Audited) -> None:
    for path in ENCODED:
        for method in ("GET", "POST", "PUT", "DELETE"):
            target = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n"
            for role in ("deploy", "admin"):
                key = f"Authorization: Bearer {server.keys['operator' if role == 'admin' else 'acme', role]}\r\n"
                assert server.raw(f"{target}{key}\r\n".encode())[9:12] == b"400", path
            assert server.raw(f"{target}\r\n".encode())[9:12] == b"401", path


def test_names_may_be_encoded(server: Audited) -> None:
    for path in ("mood", "m%6Fod", "%6d%6f%6f%64"):
        assert server.ask("GET", f"/v2/models/{path}").status_code == 200
        head = f"GET /v2/models/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        key = f"Authorization: Bearer {server.keys['acme', 'deploy']}\r\n"
        assert server.raw(f"{head}{key}\r\n".encode())[9:12] == b"200"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=8), st.none() | st.text(max_size=8))
def test_every_name_is_read_as_it_was_written(model: str, version: str | None) -> None:
    names = [model] if version is None else [model, version]
    path = (
        "/v2/models/"
        + "/versions/".join(quote(name, safe="", errors="replace").replace(".", "%2E") for name in names)
        + "/infer"
    )
    found = _asked({"path": "", "raw_path": path.encode()})
    if any("/" in name or name in {".", ".."} for name in names):
        assert found is None
    else:
        assert found == (model, version or "")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["/v2", "/models", "/mood", "/infer", "/", "%2f", "%2F", "%69", "%2e%2e", "v2"]), max_size=7
    )
)
def test_a_path_means_one_thing(parts: Sequence[str]) -> None:
    """No path is taken for inference that a proxy, which splits it before decoding, would not take for it."""
    path = "".join(parts)
    found = _asked({"path": "", "raw_path": path.encode()})
    assert (found is not None) <= (model_of(path) is not None)


def test_a_server_that_gives_no_raw_path_is_served() -> None:
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    class Core:
        components = SimpleNamespace(several=())

        def live(self) -> bool:
            return True

    scope = {"type": "http", "method": "GET", "path": "/v2/health/live", "headers": []}
    asyncio.run(application(Core())(scope, None, send))  # type: ignore[arg-type]
    assert told[0]["status"] == 200
