"""The whole server over HTTP: real runtime, registry, keys, and tritonclient as the client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.helpers.server.live import Live, running
from tests.helpers.server.v2_bodies import RAW, framed, tensor
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS, serve
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.runtime.server.rest.openapi import ROUTE, document
from tpeft_deploy.runtime.server.rest.routes import ROUTES
from tpeft_deploy.runtime.server.tenancy.access import Action


@pytest.fixture(scope="module")
def live(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, others: list[Adapter]) -> Iterator[Live]:
    own = serve(conv_bundle, tmp_path_factory.mktemp("rest") / "state")
    with running(own) as found:
        assert found.register(others[0]).status_code == 200
        assert found.register(others[1], "secret", "rival").status_code == 200
        yield found
    own.runtime.close()
    own.state.close()


def test_json_both_ways(live: Live) -> None:
    answer = live.ask("POST", "/v2/models/mood/infer", json={"id": "7", "inputs": [tensor()]})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["id"] == "7"
    assert found["model_version"] == "1"
    (output,) = [output for output in found["outputs"] if output["name"] == "logits"]
    expected = live.served.runtime.run({"pixels": PIXELS}, "acme/mood@1")["logits"]
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, rtol=1e-5, atol=1e-6)
    nested = {**tensor(), "data": PIXELS.tolist()}
    again = live.ask("POST", "/v2/models/mood/infer", json={"inputs": [nested]}).json()
    assert again["outputs"] == found["outputs"]


def test_tritonclient_in_binary_with_mixed_rows(live: Live) -> None:
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    with http.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
        headers = live.headers()
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("mood", "1", headers=headers)
        assert not client.is_model_ready("secret", headers=headers)
        assert client.get_server_metadata(headers=headers)["bundle"] == "conv"
        assert client.get_model_metadata("conv", headers=headers)["inputs"][-1]["name"] == "adapter"
        config = client.get_model_config("mood", headers=headers)
        assert config["max_batch_size"] == 32
        assert config["model_transaction_policy"] == {"decoupled": False}  # it generates no text
        index = {model["name"] for model in client.get_model_repository_index(headers=headers)}
        assert {"base", "conv", "mood", "two"} <= index
        pixels = http.InferInput("pixels", list(PIXELS.shape), "FP32")
        pixels.set_data_from_numpy(PIXELS)
        names = http.InferInput("adapter", [4], "BYTES")
        names.set_data_from_numpy(np.array([b"mood", b"base", b"partial", b"mood@1"], object))
        wanted = [http.InferRequestedOutput("logits", binary_data=True)]
        keys = ["acme/mood@1", "base", "partial", "acme/mood@1"]
        expected = live.served.runtime.run({"pixels": PIXELS}, tasks=keys)["logits"]
        for compressed in (None, "gzip", "deflate"):
            answer = client.infer(
                "conv", [pixels, names], outputs=wanted, headers=dict(headers),
                request_compression_algorithm=compressed, response_compression_algorithm=compressed,
            )  # fmt: skip
            np.testing.assert_allclose(answer.as_numpy("logits"), np.stack(list(expected)), rtol=1e-5, atol=1e-6)
        client.unload_model("mood", headers=headers)
        assert not client.is_model_ready("mood", headers=headers)
        client.load_model("mood", headers=headers)
        assert client.is_model_ready("mood", headers=headers)
        stats = client.get_inference_statistics("mood", headers=headers)["model_stats"]
        assert stats[0]["name"] == "mood"
        for call in (client.get_system_shared_memory_status, client.get_trace_settings, client.get_log_settings):
            with pytest.raises(InferenceServerException, match="no such route"):
                call(headers=headers)


def filled(path: str) -> str:
    own = {"model": "secret", "task": "secret", "version": "1", "alias": "current", "key": "abc", "tenant": "rival"}
    return path.format(**own)


WALK = [(route.method, route.path, route.action) for route in (*ROUTES, ROUTE)] + [
    ("POST", "/v2/models/{model}/infer", Action.INFER),
    ("POST", "/v2/models/{model}/versions/{version}/infer", Action.INFER),
]
FOREIGN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "secret", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "secret", "prompt": "x"},
    "/v1/embeddings": {"model": "secret", "input": "x"},
    "/v1/classify": {"model": "secret", "input": "x"},
    "/v1/tokenize": {"model": "secret", "prompt": "x"},
    "/v1/detokenize": {"model": "secret", "tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "mine", "lora_path": "secret"},
    "/v1/unload_lora_adapter": {"lora_name": "secret"},
}
"""Requests for another tenant's model, where the body names it."""
ROLES = {
    "infer": {Action.HEALTH, Action.READ, Action.INFER},
    "deploy": {Action.HEALTH, Action.READ, Action.INFER, Action.DEPLOY},
    "admin": set(Action),
}


@pytest.mark.parametrize(("method", "path", "action"), WALK)
def test_no_route_is_open_to_those_it_is_not_for(live: Live, method: str, path: str, action: Action) -> None:
    """Without a key, with a foreign tenant's, and with each role."""
    body = {"inputs": [tensor()]} if action is Action.INFER else None
    without = httpx.request(method, live.url + filled(path), json=body)
    if action is Action.HEALTH:
        assert without.status_code == 200
        return
    assert without.status_code == 401
    assert set(without.json()) == {"error"}
    assert without.headers["www-authenticate"] == "Bearer"
    assert (
        httpx.request(method, live.url + filled(path), json=body, headers={"Authorization": "Bearer x"}).status_code
        == 401
    )
    body = FOREIGN.get(path, body)
    for role in ("infer", "deploy"):
        answer = live.ask(method, filled(path), "acme", role, json=body)
        if action not in ROLES[role] or path == "/metrics":
            assert answer.status_code == 403, answer.text
        elif path in FOREIGN:
            assert answer.status_code == 404, answer.text
        elif "{task}" in path or "{model}" in path:
            assert answer.status_code in {404, 400}, answer.text  # another tenant's: as if it were not there
        assert b"rival" not in answer.content or action is Action.ADMIN
    answer = live.ask(method, filled(path), "operator", "admin", json=body)
    assert answer.status_code not in {401, 403}, answer.text
    assert live.ask("GET", "/v2/registry/tasks/secret", "rival").status_code == 200


def test_the_walk_names_another_tenants_model_in_every_body() -> None:
    bodies = {route.path for route in ROUTES if route.method == "POST" and route.path.startswith("/v1/")}
    assert bodies == set(FOREIGN)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/models/mood/infer", 405),
        ("DELETE", "/v2", 405),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/..%2f..%2fetc/infer", 400),
        ("POST", "/v2/models/%00/infer", 404),
        ("GET", "/v2/models/mood/versions/9", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
    ],
)
def test_what_is_not_there_is_said_as_json(live: Live, method: str, path: str, status: int) -> None:
    answer = live.ask(method, path, json={"inputs": [tensor()]} if method == "POST" else None)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (framed({"inputs": [RAW]}, bytes(672)), 200),
        (framed({"inputs": [RAW]}, bytes(671)), 400),
        (framed({"inputs": [RAW]}, bytes(673)), 400),
        (framed({"inputs": [{**RAW, "parameters": {"binary_data_size": -8}}]}, bytes(672)), 400),
        (framed({"inputs": [{**RAW, "shape": [1 << 40, 1 << 40]}]}, bytes(672)), 413),
        (framed({"inputs": [{**RAW, "shape": [-1, 1, 12, 14]}]}, bytes(672)), 400),
        (framed({"inputs": [{**RAW, "datatype": "FP99"}]}, bytes(672)), 400),
        (framed({"inputs": [RAW, RAW]}, bytes(1344)), 400),
        (framed({"inputs": []}), 400),
        (framed({"inputs": [RAW], "more": 1}, bytes(672)), 400),
        ({"content": b"{", "headers": {}}, 400),
        ({"content": b"{}", "headers": {"Inference-Header-Content-Length": "-1"}}, 400),
        ({"content": b"{}", "headers": {"Inference-Header-Content-Length": "99"}}, 400),
        ({"content": b"{}", "headers": {"Inference-Header-Content-Length": "0"}}, 501),
        ({"content": b"{}", "headers": {"Content-Encoding": "br"}}, 501),
        ({"content": b"{}", "headers": {"Content-Encoding": "gzip"}}, 400),
        ({"content": b"[" * 100_000, "headers": {}}, 400),
    ],
)
def test_hostile_bodies_are_refused_and_nothing_breaks(live: Live, request_: dict[str, Any], status: int) -> None:
    answer = live.ask("POST", "/v2/models/mood/infer", **request_)
    assert answer.status_code == status, answer.text
    assert live.ask("GET", "/v2").status_code == 200


def test_a_bomb_is_not_unpacked(live: Live) -> None:
    import gzip

    bomb = gzip.compress(bytes(200 << 20), 9)
    answer = live.ask("POST", "/v2/models/mood/infer", content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413


def test_the_registry_over_http(live: Live, others: list[Adapter], tmp_path: Path) -> None:
    for adapter in others[:2]:
        found = live.register(adapter, "swap").json()
    assert found["aliases"] == {"current": "2"}
    path = "/v2/registry/tasks/swap"
    assert live.ask("PUT", f"{path}/aliases/old", json={"version": 1}).json()["aliases"]["old"] == "1"
    assert live.ask("POST", f"{path}/aliases/current/rollback").json()["aliases"]["current"] == "1"
    assert live.ask("DELETE", f"{path}/versions/1").status_code == 409
    assert live.ask("PUT", f"{path}/pin", json={"folded": True}).status_code == 200
    (one, _) = live.ask("GET", path).json()["versions"]
    assert one["tier"] == "folded"
    assert live.ask("DELETE", f"{path}/pin").status_code == 200
    raw = live.ask("POST", f"{path}/versions", content=others[2].to_bytes())
    assert raw.json()["aliases"]["current"] == "3"
    bad = live.ask("POST", f"{path}/versions", content=b"\x80\x04pickle")
    assert bad.status_code == 400
    assert str(tmp_path.parent) not in bad.text
    assert live.ask("DELETE", path).status_code == 200
    assert live.ask("GET", path).status_code == 404
    audit = live.ask("GET", "/v2/admin/audit?limit=5", "operator", "admin").json()
    assert [entry["action"] for entry in audit] == ["delete", "register", "unpin", "pin", "roll back"]


def test_keys_over_http(live: Live) -> None:
    created = live.ask(
        "POST", "/v2/admin/keys", "operator", "admin", json={"tenant": "new", "role": "infer", "expires_in": 60}
    ).json()
    own = {"Authorization": f"Bearer {created['key']}"}
    assert httpx.get(live.url + "/v2", headers=own).status_code == 200
    listed = live.ask("GET", "/v2/admin/keys?tenant=new", "operator", "admin")
    assert created["key"] not in listed.text
    assert [key["id"] for key in listed.json()] == [created["id"]]
    assert live.ask("DELETE", f"/v2/admin/keys/{created['id']}", "operator", "admin").status_code == 200
    assert httpx.get(live.url + "/v2", headers=own).status_code == 401


def test_a_large_raw_tensor_is_answered_as_the_runtime_does(live: Live) -> None:
    big = np.random.default_rng(1).standard_normal((700, 1, 12, 14)).astype(np.float32)
    own = {**RAW, "shape": list(big.shape), "parameters": {"binary_data_size": big.nbytes}}
    found = live.ask("POST", "/v2/models/mood/infer", **framed({"inputs": [own]}, big.tobytes()))
    assert found.status_code == 200, found.text
    (output,) = [output for output in found.json()["outputs"] if output["name"] == "logits"]
    expected = live.served.runtime.run({"pixels": big}, "acme/mood@1")["logits"]
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, rtol=1e-5, atol=1e-6)


def test_a_client_that_goes_away_stops_its_request(live: Live) -> None:
    big = np.zeros((2000, 1, 12, 14), np.float32)
    text = json.dumps({"inputs": [{**RAW, "shape": list(big.shape), "parameters": {"binary_data_size": big.nbytes}}]})
    with socket.create_connection(("127.0.0.1", live.port)) as client:
        head = (
            f"POST /v2/models/mood/infer HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\n"
            f"Authorization: {live.headers()['Authorization']}\r\n"
            f"Inference-Header-Content-Length: {len(text)}\r\nContent-Length: {len(text) + big.nbytes}\r\n\r\n"
        )
        client.sendall(head.encode() + text.encode() + big.tobytes())
        time.sleep(0.005)
    wait_until(lambda: [one.status for one in live.exchanges if one.request_id == "gone"])
    assert next(one.status for one in live.exchanges if one.request_id == "gone") in {499, 200}
    assert live.ask("GET", "/v2").status_code == 200


def test_exchanges_say_who_asked_for_what(live: Live) -> None:
    own = {"X-Request-Id": "abc"}
    live.ask("POST", "/v2/models/mood/infer", "acme", "infer", json={"inputs": [tensor()]}, headers=own)
    live.ask("GET", "/made/up/by/a/client", headers={"X-Request-Id": "def"})
    wait_until(lambda: {"abc", "def"} <= {one.request_id for one in live.exchanges})  # told after its answer
    first, second = (next(one for one in live.exchanges if one.request_id == own) for own in ("abc", "def"))
    assert (first.route, first.status, first.tenant, first.task) == ("/v2/models/{model}/infer", 200, "acme", "mood")
    assert first.request_id == "abc"
    assert second.route == "unknown"


def test_the_document_in_the_repository_is_the_servers(live: Live) -> None:
    served = live.ask("GET", "/openapi.json").json()
    kept = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text())
    assert served == document() == kept
