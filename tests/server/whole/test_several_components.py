"""A server of a bundle with several components, with tritonclient over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.helpers import two_towers
from tests.helpers.server.live import Live, running
from tests.helpers.server.rpc_serving import serving
from tests.server.conftest import serve
from tpeft_deploy import Bundle, Client
from tpeft_deploy.errors import InputError, NotFound
from tpeft_deploy.tucker import Array

ADAPTERS = two_towers.adapters()
COMPONENTS = list(two_towers.SIZES)
NAMES = [f"{model}/{own}" for model in ("base", "towers", *sorted(ADAPTERS)) for own in COMPONENTS]


@pytest.fixture(scope="module")
def live(towers_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    own = serve(towers_bundle, tmp_path_factory.mktemp("towers") / "state")
    with running(own) as found:
        yield found
    own.runtime.close()
    own.state.close()


def sent(client: Any, component: str, tasks: Sequence[str] = (), rows: int = 3) -> list[Any]:
    """The inputs of a request, in the classes of a module of tritonclient."""
    array = two_towers.inputs(component, rows)["x"]
    inputs = [client.InferInput("x", list(array.shape), "FP32")]
    inputs[0].set_data_from_numpy(array)
    if tasks:
        inputs.append(client.InferInput("adapter", [len(tasks)], "BYTES"))
        inputs[1].set_data_from_numpy(np.array([task.encode() for task in tasks], object))
    return inputs


def check(found: Array, component: str, tasks: Sequence[str]) -> None:
    given = two_towers.inputs(component, len(found))
    for row, task in enumerate(tasks):
        expected = two_towers.expected(component, ADAPTERS.get(task), given)[row]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def check_client(module: Any, client: Any, headers: dict[str, str]) -> None:
    for component in COMPONENTS:
        mixed, name = ["both", "base", "reading"], f"towers/{component}"
        answer = client.infer(name, sent(module, component, mixed), headers=headers)
        check(answer.as_numpy("scores"), component, mixed)
        answer = client.infer(f"both/{component}", sent(module, component), model_version="1", headers=headers)
        check(answer.as_numpy("scores"), component, ["both"] * 3)
        parameters = {"component": component}
        answer = client.infer("seeing", sent(module, component), parameters=parameters, headers=headers)
        check(answer.as_numpy("scores"), component, ["seeing"] * 3)
        answer = client.infer(
            "towers", sent(module, component), parameters={**parameters, "adapter": "both"}, headers=headers
        )
        check(answer.as_numpy("scores"), component, ["both"] * 3)
        assert client.is_model_ready(name, headers=headers)
    for refused, text in [("both", "both/image, both/text"), ("both/audio", "among image, text")]:
        with pytest.raises(Exception, match=text):
            client.infer(refused, sent(module, "text"), headers=headers)
    with pytest.raises(Exception, match="one component"):
        client.infer("both/text", sent(module, "text"), parameters={"component": "image"}, headers=headers)


def test_tritonclient_over_http(live: Live) -> None:
    from tritonclient import http

    with http.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
        headers = live.headers()
        check_client(http, client, headers)
        assert [own["name"] for own in client.get_model_repository_index(headers=headers)] == NAMES
        metadata = client.get_model_metadata("towers/text", headers=headers)
        assert metadata["name"] == "towers/text"
        assert [(own["name"], own["shape"]) for own in metadata["inputs"]] == [("x", [-1, 5]), ("adapter", [-1])]
        assert client.get_model_metadata("both/image", "1", headers=headers)["outputs"][0]["shape"] == [-1, -1]
        assert client.get_model_config("both/image", headers=headers)["input"][0]["dims"] == [6]
        counts = client.get_inference_statistics("both/image", headers=headers)["model_stats"]
        assert [own["name"] for own in counts] == ["both/image"]
        assert counts[0]["inference_count"] >= 3
        both = client.get_inference_statistics("both", headers=headers)["model_stats"]
        assert [own["name"] for own in both] == ["both/image", "both/text"]
        every = client.get_inference_statistics(headers=headers)["model_stats"]
        assert [own["name"] for own in every] == NAMES


def test_tritonclient_over_grpc(live: Live) -> None:
    from tritonclient import grpc

    with serving(service=live.served.service) as server, grpc.InferenceServerClient(server.address) as client:
        headers = {key.lower(): value for key, value in live.headers().items()}
        check_client(grpc, client, headers)
        assert [own.name for own in client.get_model_repository_index(headers=headers).models] == NAMES
        metadata = client.get_model_metadata("towers/image", headers=headers)
        assert list(metadata.inputs[0].shape) == [-1, 6]
        counts = client.get_inference_statistics("both/text", headers=headers).model_stats
        assert [own.name for own in counts] == ["both/text"]


@pytest.mark.parametrize("slash", ["/", "%2F", "%2f"])
def test_paths_of_a_component(live: Live, slash: str) -> None:
    path = f"/v2/models/both{slash}text"
    for suffix, status in [("", 200), ("/ready", 200), ("/config", 200), ("/stats", 200), ("/versions/1", 200)]:
        assert live.ask("GET", path + suffix).status_code == status, suffix
    assert live.ask("GET", f"{path}/versions/9").status_code == 404
    assert live.ask("GET", f"{path}/infer").status_code == 405
    body = {"inputs": [{"name": "x", "shape": [1, 5], "datatype": "FP32", "data": [1, 2, 3, 4, 5]}]}
    for end in ("/infer", "/versions/1/infer"):
        answer = live.ask("POST", path + end, json=body)
        assert (answer.status_code, answer.json().get("model_name")) == (200, "both/text")


@pytest.mark.parametrize(
    "path", ["both/audio", "both%2Faudio", "both%2Ftext%2Ftext", "both/text/text", "%2Ftext", "..%2Ftext", "both%2F.."]
)
def test_other_paths_are_no_models(live: Live, path: str) -> None:
    assert live.ask("GET", f"/v2/models/{path}").status_code in {400, 404}


def test_a_task_is_loaded_and_listed_as_a_whole(live: Live) -> None:
    answer = live.ask("POST", "/v2/repository/models/both%2Ftext/unload", role="admin", tenant="operator")
    assert answer.status_code == 404
    assert {own["id"] for own in live.ask("GET", "/v1/models").json()["data"]} == {"base", "towers", *ADAPTERS}
    answer = live.register(ADAPTERS["heads"])
    assert answer.status_code == 200, answer.text
    assert live.ask("DELETE", "/v2/registry/tasks/mood").status_code == 200
    strange = {"image_heads.weight": ADAPTERS["seeing"].deltas["image.weight"]}
    answer = live.register(type(ADAPTERS["seeing"])(strange), "strange")
    assert answer.status_code == 400
    assert "'image_heads.weight'" in answer.text
    assert str(live.served.bundle.path) not in answer.text


def test_the_client_of_the_package(live: Live) -> None:
    mixed = ["both", "base", "reading"]
    with Client(live.url, live.keys["acme", "deploy"]) as client:
        for component in COMPONENTS:
            given = two_towers.inputs(component, 3)
            check(client.infer(given, f"both/{component}")["scores"], component, ["both"] * 3)
            check(client.infer(given, f"reading/{component}@1")["scores"], component, ["reading"] * 3)
            check(client.infer(given, "reading@1", component=component)["scores"], component, ["reading"] * 3)
            several = client.infer(given, tasks=mixed, component=component)["scores"]
            assert not isinstance(several, list)
            check(several, component, mixed)
            check(client.infer(given, component=component)["scores"], component, ["base"] * 3)
            # The client asks which inputs are bfloat16, of the component that the name or the argument gives.
            for task, beside in ((f"both/{component}", None), ("both", component)):
                with pytest.raises(InputError, match="expected dtype float32"):
                    client.infer({"x": np.zeros((1, 5), np.uint16)}, task, component=beside)
        for task, beside in (("base", "audio"), ("both/audio", None)):
            with pytest.raises(NotFound, match="among image, text"):
                client.infer(given, task, component=beside)
        with pytest.raises(InputError, match="one component"):
            client.infer(given, "both/text", component="image")
