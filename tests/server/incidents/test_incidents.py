"""What happened to other servers of models and adapters, and that it does not happen to this one.

All tests talk over HTTP and gRPC to a server that runs under `python -O`, here and in the files beside.

|  # | what happened elsewhere, and the tests |
|---:|---|
|  1 | The name of an adapter was a path, and led out of its directory. |
|    | test_incident_1_no_name_is_a_path |
|    | test_incident_1_names_of_files_in_uploads_go_nowhere |
|    | test_incident_1_a_link_among_the_stored_files_is_not_followed |
|  2 | A route for loading adapters was forgotten when keys were introduced. |
|    | test_incident_2_every_route_is_listed |
|    | test_incident_2_no_route_without_a_key_that_is_good |
|    | test_incident_2_each_route_for_its_roles_only |
|    | test_incident_2_every_rpc_is_listed |
|    | test_incident_2_each_rpc_for_its_roles_only |
|    | test_incident_2_nothing_but_http_is_spoken |
|  3 | A file of weights was a pickle, and ran its author's code. |
|    | test_incident_3_nothing_but_safetensors_is_taken |
|  4 | A check was an `assert`, and `python -O` left it out. |
|    | test_incident_4_no_check_of_the_product_is_an_assert |
|    | test_incident_4_these_tests_talk_to_a_server_without_asserts |
|  5 | The caller chose code or a repository for the server to load. |
|    | test_incident_5_a_configuration_fetches_and_imports_nothing |
|  6 | An answer came from another tenant's adapter, or from the one before. |
|    | test_incident_6_swaps_under_load |
|    | test_incident_6_a_name_that_is_deleted_and_registered_again |
|    | test_incident_6_two_tenants_with_the_same_name_and_the_same_request |
|  7 | A small request took all memory, or all waited without end. |
|    | test_incident_7_sizes_that_lie |
|    | test_incident_7_bombs_are_not_unpacked |
|    | test_incident_7_bodies_without_end |
|    | test_incident_7_headers_without_end |
|    | test_incident_7_a_full_queue_says_when_to_come_again |
|    | test_incident_7_a_quota_says_when_to_come_again |
|    | test_incident_7_bombs_are_not_unpacked_over_grpc |
|    | test_incident_7_more_headers_than_anybody_sends |
|  8 | One more adapter than there was room for, or one bad request, ended all. |
|    | test_incident_8_a_bad_request_fails_alone |
|    | test_incident_8_a_row_that_fails_in_the_model_fails_alone |
|  9 | Who sent most was served, and others waited behind. |
|    | test_incident_9_a_flood_delays_nobody_else |
|    | test_incident_9_a_flood_that_fills_the_device_delays_nobody_else |
| 10 | An adapter that changed nothing was loaded, and the base answered for it. |
|    | test_incident_10_what_does_not_bind_is_refused |
|    | test_incident_10_an_answer_names_what_answered |
|    | test_incident_10_what_no_longer_fits_its_base_is_not_served_as_the_base |
| 11 | Messages told how to reach the server's memory. |
|    | test_incident_11_there_is_no_shared_memory |
|    | test_incident_11_errors_tell_nothing_of_the_server |
| 12 | A graph of a model named files to be read beside it. |
|    | test_incident_12_no_graph_is_taken |
| 13 | All tenants had one key, and some routes none. |
|    | test_incident_13_another_tenants_things_are_not_there |
|    | test_incident_13_only_an_admin_names_another_tenant |
|    | test_incident_13_another_tenants_things_are_not_there_for_rpcs |
| 14 | Names that a client made up filled the disk, or memory. |
|    | test_incident_14_quotas_of_what_is_stored |
|    | test_incident_14_names_that_clients_make_up_are_not_kept |
|    | test_incident_14_refused_uploads_are_not_stored |
| 15 | Nobody could say whether the adapter that answered is the one that was made. |
|    | test_incident_15_the_digest_is_that_of_the_content |
|    | test_incident_15_a_file_that_was_altered_never_answers |
|    | test_incident_15_a_file_that_is_altered_while_it_is_served |
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.server.audited import KEYS, ROOT, Audited
from tests.helpers.server.incidents import message_for
from tests.helpers.server.rpc_serving import NOT_OURS
from tests.helpers.server.v2_bodies import tensor
from tpeft_deploy.runtime.server.rest.openapi import ROUTE, document
from tpeft_deploy.runtime.server.rest.routes import ROUTES
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import METHODS

_TASK = "/v2/registry/tasks/{task}"
_MODEL = "/v2/models/{model}"
_VERSION = "/v2/models/{model}/versions/{version}"
# By hand: a route or rpc that is new has to be written here, by somebody who thinks about who may call it.
OPEN = {"GET /v2/health/live", "GET /v2/health/ready"}
EXPECTED = {
    **dict.fromkeys(OPEN, "nobody"),
    **dict.fromkeys(("GET /v2", "GET /v2/models/stats", "GET /v1/models", "GET /openapi.json"), "infer"),
    **dict.fromkeys((f"GET {_MODEL}{suffix}" for suffix in ("", "/ready", "/config", "/stats")), "infer"),
    **dict.fromkeys((f"GET {_VERSION}{suffix}" for suffix in ("", "/ready", "/config", "/stats")), "infer"),
    f"POST {_MODEL}/infer": "infer",
    f"POST {_VERSION}/infer": "infer",
    **dict.fromkeys((f"POST {own}/generate{rest}" for own in (_MODEL, _VERSION) for rest in ("", "_stream")), "infer"),
    **dict.fromkeys(("GET /v1/models/{model}", "POST /v1/chat/completions", "POST /v1/completions"), "infer"),
    **dict.fromkeys((f"POST /v1/{name}" for name in ("embeddings", "classify", "tokenize", "detokenize")), "infer"),
    "POST /v2/repository/index": "infer",
    "GET /v2/registry/tasks": "infer",
    f"GET {_TASK}": "infer",
    f"GET {_TASK}/aliases/{{alias}}/history": "infer",
    **dict.fromkeys(("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"), "deploy"),
    "POST /v2/repository/models/{model}/load": "deploy",
    "POST /v2/repository/models/{model}/unload": "deploy",
    f"POST {_TASK}/versions": "deploy",
    f"DELETE {_TASK}/versions/{{version}}": "deploy",
    f"DELETE {_TASK}": "deploy",
    f"PUT {_TASK}/aliases/{{alias}}": "deploy",
    f"POST {_TASK}/aliases/{{alias}}/rollback": "deploy",
    f"PUT {_TASK}/pin": "deploy",
    f"DELETE {_TASK}/pin": "deploy",
    f"POST {_TASK}/publish": "admin",
    "GET /v2/admin/keys": "admin",
    "POST /v2/admin/keys": "admin",
    "DELETE /v2/admin/keys/{key}": "admin",
    "GET /v2/admin/tenants": "admin",
    "PUT /v2/admin/tenants/{tenant}": "admin",
    "GET /v2/admin/audit": "admin",
    "GET /metrics": "admin",
}
EXPECTED_RPC = {
    "ServerLive": "nobody",
    "ServerReady": "nobody",
    **dict.fromkeys(("ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"), "infer"),
    **dict.fromkeys(("ModelInfer", "ModelStreamInfer", "RepositoryIndex"), "infer"),
    **dict.fromkeys(("RepositoryModelLoad", "RepositoryModelUnload"), "deploy"),
}
ROLES = ("infer", "deploy", "admin")


def test_every_incident_has_its_tests_and_they_are_there() -> None:
    numbers: list[int] = []
    listed: list[str] = []
    for number, name in re.findall(r"^\| +(?:(\d+) \| .*\.|\| (test_incident_\w+)) \|$", __doc__ or "", re.MULTILINE):
        if number:
            numbers.append(int(number))
        else:
            listed.append(name)
            assert name.startswith(f"test_incident_{numbers[-1]}_")
    assert numbers == list(range(1, 16))
    assert {int(name.split("_")[2]) for name in listed} == set(numbers)
    written = [
        node.name
        for file in Path(__file__).parent.glob("test_incidents*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_incident_")
    ]
    assert sorted(listed) == sorted(written)


def asked(server: Audited, line: str, name: str = "nothing", **more: Any) -> httpx.Response:
    """The request of a line of the table, for one name wherever it names something."""
    method, path = line.split()
    own = {"version": "1", "alias": "current", "key": "0" * 12, "tenant": name, "model": name, "task": name}
    body: dict[str, Any] = {}
    if path.endswith("/infer"):
        body = {"json": {"inputs": [tensor()]}}
    elif path.endswith("/completions"):
        body = {"json": {"model": name, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}}
    elif "/generate" in path:
        body = {"json": {"text_input": "x"}}
    elif path.endswith("load_lora_adapter"):
        body = {"json": {"lora_name": name, "lora_path": name}}
    elif path in {"/v1/embeddings", "/v1/classify", "/v1/tokenize", "/v1/detokenize"}:
        body = {"json": {"model": name, "input": "x", "prompt": "x", "tokens": [1]}}
    elif path.endswith("/versions"):
        body = {"content": b"no adapter"}
    elif "/aliases/" in path and method == "PUT":
        body = {"json": {"version": "1"}}
    return server.ask(method, path.format(**own), **body, **more)


def test_incident_2_every_route_is_listed() -> None:
    inferring = {f"POST {_MODEL}/infer", f"POST {_VERSION}/infer"}
    assert {f"{route.method} {route.path}" for route in (*ROUTES, ROUTE)} | inferring == set(EXPECTED)
    described = document()["paths"]
    assert {f"{method.upper()} {path}" for path, own in described.items() for method in own} == set(EXPECTED)


@pytest.mark.parametrize("line", EXPECTED)
def test_incident_2_no_route_without_a_key_that_is_good(server: Audited, line: str) -> None:
    good = server.keys["operator", "admin"]
    bad = [
        "", "Bearer", "Bearer x", "bearer", f"Basic {good}", f"Bearer {good}x", f"Bearer {good[:-1]}", good,
        f"Bearer {server.keys['revoked', 'admin']}", f"Bearer {server.keys['expired', 'admin']}",
    ]  # fmt: skip
    before = server.ask("GET", "/v2/admin/audit?limit=1", "operator", "admin").json()
    for value in bad:
        answer = asked(server, line, "mood", headers={"Authorization": value})
        if line in OPEN:
            assert answer.status_code == 200
        else:
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (value, answer.text)
            assert "mood" not in answer.text
    if line not in OPEN:
        method, path = line.split()
        for elsewhere in (f"{path}?key={good}", f"{path}?access_token={good}"):
            named = {"X-Api-Key": good, "Cookie": f"key={good}", "X-Forwarded-For": "127.0.0.1"}
            found = server.client.request(method, elsewhere, headers=named)
            assert found.status_code == 401
    assert server.ask("GET", "/v2/admin/audit?limit=1", "operator", "admin").json() == before


@pytest.mark.parametrize("line", EXPECTED)
def test_incident_2_each_route_for_its_roles_only(server: Audited, line: str) -> None:
    for role in ROLES:
        answer = asked(server, line, role=role)
        if line not in OPEN and ROLES.index(role) < ROLES.index(EXPECTED[line]):
            assert answer.status_code == 403, (role, answer.text)
            assert f"'{EXPECTED[line]}'" in answer.text
        else:
            assert answer.status_code in {200, 400, 404}, (role, answer.text)
    method, path = line.split()
    for other in {"HEAD", "OPTIONS", "PATCH", "TRACE", "PUT", "DELETE", "POST", "GET"} - {method}:
        if f"{other} {path}" not in EXPECTED:
            own = path.format(version="1", alias="x", key="x", tenant="x", model="nothing", task="nothing")
            without = server.client.request(other, own)
            assert without.status_code == 401, other
            assert server.ask(other, own).status_code == 405 if other != "HEAD" else True


def test_incident_2_every_rpc_is_listed() -> None:
    described = {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    assert set(METHODS) == set(EXPECTED_RPC) == described


@pytest.mark.parametrize("rpc", [*EXPECTED_RPC, *NOT_OURS])
def test_incident_2_each_rpc_for_its_roles_only(server: Audited, rpc: str) -> None:
    needed = EXPECTED_RPC.get(rpc)
    good = server.keys["operator", "admin"]
    for key in ("", "x", f"{good}x", server.keys["revoked", "admin"], server.keys["expired", "admin"]):
        told = server.call(rpc, message_for(rpc), key=key)
        assert told.status == ("OK" if needed == "nobody" else "UNAUTHENTICATED")
    for role in ROLES:
        told = server.call(rpc, message_for(rpc), role=role)
        if needed is None:
            assert told.status == "UNIMPLEMENTED"
        elif needed != "nobody" and ROLES.index(role) < ROLES.index(needed):
            assert told.status == "PERMISSION_DENIED"
        else:
            assert told.status in {"OK", "NOT_FOUND", "ERROR"}, told


def test_incident_2_nothing_but_http_is_spoken(server: Audited) -> None:
    """What a library for WebSockets would take over never comes to the keys."""
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    for path in ("/v2", "/v2/models/mood/infer", "/metrics"):
        assert server.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode()).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("line", [line for line in EXPECTED if "{model}" in line or "{task}" in line])
def test_incident_13_another_tenants_things_are_not_there(server: Audited, line: str) -> None:
    before = server.ask("GET", "/v2/registry/tasks", "rival", "infer").json()
    for role in ROLES:
        found, none = (asked(server, line, name, role=role) for name in ("secret", "nothing"))
        assert found.status_code == none.status_code
        assert found.text.replace("secret", "nothing") == none.text
        if not found.is_error:
            raise AssertionError(found.text)
    assert server.ask("GET", "/v2/registry/tasks", "rival", "infer").json() == before


@pytest.mark.parametrize("rpc", [rpc for rpc in EXPECTED_RPC if "Model" in rpc])
def test_incident_13_another_tenants_things_are_not_there_for_rpcs(server: Audited, rpc: str) -> None:
    for role in ROLES:
        found, none = (server.call(rpc, message_for(rpc, name), role=role) for name in ("secret", "nothing"))
        assert (found.status, found.text.replace("secret", "nothing")) == (none.status, none.text)
        assert found.status in {"NOT_FOUND", "ERROR", "PERMISSION_DENIED"}
    for role in ("infer", "admin"):
        for listing in ("RepositoryIndex", "ModelStatistics"):
            assert b"secret" not in server.call(listing, role=role).answers[0]
            assert b"secret" in server.call(listing, tenant="rival", role="infer").answers[0]


def test_incident_13_only_an_admin_names_another_tenant(server: Audited) -> None:
    lines = [f"{route.method} {route.path}" for route in ROUTES if "tenant" in route.query]
    assert len(lines) > 8
    for line in lines:
        for role in ("infer", "deploy"):
            answer = asked(server, line, "secret", role=role, params={"tenant": "rival"})
            assert answer.status_code == 403, line
    for role in ("infer", "deploy"):
        for names in ("secret", "secret@1", "rival/secret@1", "/secret@1"):
            given = [tensor(), {"name": "adapter", "shape": [1], "datatype": "BYTES", "data": [names]}]
            ways: list[dict[str, Any]] = [
                {"json": {"inputs": given}},
                {"json": {"inputs": given[:1], "parameters": {"adapter": names}}},
                {"json": {"inputs": given[:1]}, "headers": {"X-Adapter": names}},
            ]
            for way in ways:
                assert server.ask("POST", "/v2/models/conv/infer", role=role, **way).status_code == 404
    rivals = {f"Bearer {server.keys[tenant, role]}" for tenant, role in KEYS if tenant == "rival"}
    shown = server.ask("GET", "/v2/admin/keys", "operator", "admin").text
    assert not any(key.removeprefix("Bearer ") in shown for key in rivals)


def test_incident_4_no_check_of_the_product_is_an_assert() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for folder in ("tpeft_deploy", "runtime", "exporters")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_incident_4_these_tests_talk_to_a_server_without_asserts(server: Audited) -> None:
    assert json.loads((server.place / "events").read_text().splitlines()[0]) == ["debug", False]
    assert __debug__, "and what they check is checked"
