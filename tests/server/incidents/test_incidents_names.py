"""Incidents 1 and 11, of the table in test_incidents.py: names that are paths, and what errors tell."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import random
import re
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from tests.helpers.server.audited import Audited, check_tree, load_message, tree
from tests.helpers.server.incidents import message_for
from tests.helpers.server.rpc_serving import NOT_OURS
from tests.helpers.server.v2_bodies import framed, tensor
from tpeft_deploy import Adapter
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb

# What is a path, or becomes one when it is unquoted once more, in the ways in which that was tried elsewhere.
PATHS = [
    "..", ".", "../x", "../../x", "..%2fx", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..\\x", "..%5cx", "/etc",
    "//x", "%2fetc%2fpasswd", "%252e%252e%252fx", "C:\\x", "file:///x", "~", "~root", "x/../../y", "x%00", "%00",
    "x%00.safetensors", "x%0a", "x%0d%0aHost:%20y", "%c0%ae%c0%ae", "%ed%a0%80", "\u202e", "\uff0e\uff0e", "\u2215etc",
    "mood\u200b", "m\u043eod", "mood ", " mood", "mood;x", "mood#x", "mood?x=/v2", "-rf", "$HOME", "`id`", "a" * 129,
    "acme/mood@x", "mood@1", "@", "",
]  # fmt: skip
ALPHABET = ["..", ".", "/", "%2f", "%2e", "\\", "%5c", "%00", "%", "é", "\u202e", "mood", "@", "1", ":", "~", "#"]


def made_up(count: int) -> list[str]:
    """Of the same pieces, without those that are names."""
    choice = random.Random(count)
    found = ["".join(choice.choices(ALPHABET, k=choice.randrange(1, 9))) for _ in range(count)]
    return [name for name in found if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", unquote(name))]


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_incident_1_no_name_is_a_path(server: Audited, others: list[Adapter], count: int) -> None:
    good, row = others[2].to_bytes(), json.dumps({"inputs": [tensor()]}).encode()
    before, files = server.ask("GET", "/v2/registry/tasks").json(), tree(server.place)
    names = [*PATHS, *made_up(count)]
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)) as connection:
        for name in names:
            own = quote(name, safe="%/\\:;@$")
            for method, path, body in (
                ("POST", f"/v2/registry/tasks/{own}/versions", good),
                ("POST", f"/v2/registry/tasks/mood/versions?alias={own or '/'}", good),
                ("POST", f"/v2/registry/tasks/mood/versions?tenant={own}", good),
                ("GET", f"/v2/registry/tasks/{own}", b""),
                ("DELETE", f"/v2/registry/tasks/{own}", b""),
                ("PUT", f"/v2/registry/tasks/mood/aliases/{own}", b'{"version":"1"}'),
                ("POST", f"/v2/repository/models/{own}/load", b""),
                ("POST", f"/v2/models/{own}/infer", row),
                ("POST", f"/v2/models/mood/versions/{own or '@'}/infer", row),
                ("PUT", f"/v2/admin/tenants/{own}", b"{}"),
            ):
                # Not through httpx, which writes paths in its own way.
                connection.request(method, path, body, server.headers("acme", "admin"))
                answer = connection.getresponse()
                told = json.loads(answer.read())
                assert 400 <= answer.status < 500, (method, path, told)
                server.check_text(told["error"])
    for name in names:
        call = server.call("RepositoryModelLoad", load_message(name, {"file:adapter.safetensors": good}))
        assert call.status == "INVALID_ARGUMENT", (name, call)
        for rpc in ("ModelInfer", "ModelReady", "RepositoryModelUnload"):
            assert server.call(rpc, message_for(rpc, name)).status in {"NOT_FOUND", "INVALID_ARGUMENT"}, (rpc, name)
    check_tree(server.place, files)
    assert server.ask("GET", "/v2/registry/tasks").json() == before


def test_incident_1_names_of_files_in_uploads_go_nowhere(server: Audited, others: list[Adapter]) -> None:
    good = others[2].to_bytes()
    digest = hashlib.sha256(good).hexdigest()
    wanted = tree(server.place) | {f"state/blobs/{digest[:2]}/{digest}.safetensors": digest}
    places = ["../../x", "/outside", "..\\x", "x\0", "a/b"]
    for place in (*(f"{one}.safetensors" for one in places), ""):
        files = {"weights": (place or "x", good, "application/octet-stream")}
        assert server.ask("POST", "/v2/registry/tasks/filed/versions", files=files).status_code == 200
        part = server.ask("POST", "/v2/registry/tasks/filed/versions", files={place or "/": ("weights", good)})
        assert part.status_code == 400
        coded = base64.b64encode(good).decode()
        own = f"file:{place or '.safetensors'}"
        for key, status in ((own, 200), (f"{own}.onnx", 400), (f"{own}/", 400), ("file:1/model.pt", 400)):
            path = "/v2/repository/models/filed/load"
            assert server.ask("POST", path, json={"parameters": {key: coded}}).status_code == status, key
            told = server.call("RepositoryModelLoad", load_message("filed", {key: good}))
            assert told.status == ("OK" if status == 200 else "INVALID_ARGUMENT")
    check_tree(server.place, wanted)
    assert not Path("/outside.safetensors").exists()
    assert server.ask("DELETE", "/v2/registry/tasks/filed").status_code == 200


SHARED_MEMORY = [
    f"/v2/{kind}sharedmemory{region}/{verb}"
    for kind in ("system", "cuda")
    for region in ("", "/region/tensors")
    for verb in ("status", "register", "unregister")
]


def test_incident_11_there_is_no_shared_memory(server: Audited) -> None:
    region = {"key": "/dev/shm/x", "offset": 0, "byte_size": 64}
    for path in (*SHARED_MEMORY, "/v2/trace/setting", "/v2/logging", "/v2/models/mood/trace/setting"):
        for method in ("GET", "POST"):
            own: dict[str, Any] = {"json": region} if method == "POST" else {}
            assert server.ask(method, path, "operator", "admin", **own).status_code == 404
            assert server.client.request(method, path, **own).status_code == 401
    for rpc in NOT_OURS:
        told = server.call(rpc, tenant="operator", role="admin")
        assert told.status == "UNIMPLEMENTED"
    named = {"shared_memory_region": "tensors", "shared_memory_byte_size": 672, "shared_memory_offset": 0}
    one = {"name": "pixels", "shape": [1, 1, 12, 14], "datatype": "FP32", "parameters": named}
    for document_ in (
        {"inputs": [one]},
        {"inputs": [tensor()], "outputs": [{"name": "logits", "parameters": named}]},
    ):
        answer = server.ask("POST", "/v2/models/mood/infer", json=document_)
        assert answer.status_code == 501
        assert "tensors in shared memory" in answer.text
        assert "region" not in answer.text
    message = pb.ModelInferRequest(model_name="mood")
    message.inputs.add(name="pixels", datatype="FP32", shape=[1, 1, 12, 14])
    message.inputs[0].parameters["shared_memory_region"].string_param = "tensors"
    assert server.call("ModelInfer", message).status == "UNIMPLEMENTED"


def test_incident_11_errors_tell_nothing_of_the_server(server: Audited) -> None:
    """Every refusal in these files is looked at; here are those that are the likeliest to say too much."""
    bad: list[tuple[str, dict[str, Any]]] = [
        ("models/mood/infer", {"content": b"{"}),
        ("models/mood/infer", {"content": b"\xff\xfe"}),
        ("models/mood/infer", {"json": {"inputs": [{**tensor(), "shape": [4, 1, 14, 12]}]}}),
        ("models/mood/infer", {"json": {"inputs": [{**tensor(), "name": "x" * 5000}]}}),
        ("models/mood/infer", {"json": {"inputs": [tensor()], "outputs": [{"name": "none"}]}}),
        ("models/two/infer", framed({"inputs": [tensor()]}, b"more")),
        ("registry/tasks/mood/versions", {"content": padded(b"\x80\x04")}),
        ("registry/tasks/mood/versions", {"content": padded(b"\xff" * 8)}),
        ("registry/tasks/mood/versions", {"files": {"config": b"{", "weights": b"x"}}),
        ("registry/tasks/mood/versions", {"files": {"config": b"{}", "weights": b"x"}}),
        ("registry/tasks/mood/versions", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
        ("repository/models/mood/load", {"json": {"parameters": {"file:x.safetensors": "no base64"}}}),
        ("repository/models/mood/load", {"json": {"parameters": {"config": "{}"}}}),
        ("repository/models/mood/load", {"json": {"parameters": {"file:x.safetensors": "AAAA"}}}),
    ]
    for path, own in bad:
        answer = server.ask("POST", f"/v2/{path}", **own)
        assert 400 <= answer.status_code < 502, (path, answer.text)
        assert answer.status_code != 500, (path, answer.text)
    for told in (
        b"\0",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / x\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        head, _, body = server.raw(told).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), (told, head)
        assert set(json.loads(body)) == {"error"}
    headers = server.ask("GET", "/v2").headers
    assert set(headers) == {"date", "content-type", "content-length", "x-request-id"}


def padded(data: bytes) -> bytes:
    return data + bytes(64)
