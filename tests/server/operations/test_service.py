"""The server's operations, on a real runtime and registry."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.server.merged import close, merged
from tests.server.conftest import PIXELS, Served, serve, upload
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import (
    AdapterError,
    Conflict,
    Forbidden,
    NotFound,
    ProtocolError,
    QuotaExceeded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from tpeft_deploy.runtime.server.v2.messages import InferRequest, InferResponse


def wait(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def ask(own: Served, model: str = "mood", tenant: str = "acme", **fields: Any) -> InferResponse:
    inputs = {"pixels": PIXELS, **fields.pop("more", {})}
    own.service.admit(own.who(tenant, "infer"))
    found = wait(own.service.infer(own.who(tenant, "infer"), InferRequest(model, inputs, **fields)))
    assert isinstance(found, InferResponse)
    return found


def register(own: Served, adapter: Adapter, name: str = "mood", tenant: str = "acme", **fields: Any) -> Any:
    parts = upload(weights=adapter.to_bytes())
    return wait(own.service.register(own.who(tenant), name, parts, **fields))


def test_an_uploaded_adapter_answers_as_its_merged_model(served: Served, others: list[Adapter]) -> None:
    document = register(served, others[0])
    assert document["versions"][0]["version"] == "1"
    answer = ask(served)
    close(answer.outputs["logits"], merged(others[0]))
    assert answer.version == "1"
    assert answer.parameters["adapter_digest"] == document["versions"][0]["digest"]


def test_mixed_rows_of_own_and_shared_tasks(served: Served, others: list[Adapter]) -> None:
    register(served, others[0])
    register(served, others[1])
    names = np.array([b"mood", b"base", b"mood@1", b"partial"], object)
    answer = ask(served, "conv", more={"adapter": names})
    rows = [ask(served), ask(served, "base"), ask(served, version="1"), ask(served, "partial")]
    for row, own in enumerate(rows):
        close(answer.outputs["logits"][row], own.outputs["logits"][row])
    assert answer.parameters["adapter_digest"] == ",".join(str(own.parameters["adapter_digest"]) for own in rows)
    close(rows[0].outputs["logits"], merged(others[1]))
    close(rows[2].outputs["logits"], merged(others[0]))


def test_rows_of_other_sizes_have_outputs_of_their_own(served: Served) -> None:
    names = np.array([b"two", b"base", b"two", b"wide"], object)
    answer = ask(served, "conv", more={"adapter": names})
    assert [name for name in answer.outputs if name.startswith("logits")] == [f"logits.{row}" for row in range(4)]
    for row, name in enumerate(["two", "base", "two", "wide"]):
        close(answer.outputs[f"logits.{row}"], ask(served, name).outputs["logits"][row])


def test_tenants_see_their_own_tasks_and_the_shared_ones(served: Served, others: list[Adapter]) -> None:
    register(served, others[0], tenant="acme")
    register(served, others[1], tenant="rival")
    close(ask(served, tenant="acme").outputs["logits"], merged(others[0]))
    close(ask(served, tenant="rival").outputs["logits"], merged(others[1]))
    with pytest.raises(NotFound):
        ask(served, tenant="third")
    register(served, others[2], name="secret", tenant="rival")
    for call in (
        lambda: ask(served, "secret"),
        lambda: ask(served, "conv", more={"adapter": np.array([b"secret"], object)}),
        lambda: served.service.model_metadata(served.who(), "secret"),
        lambda: served.service.task(served.who(), "secret"),
        lambda: wait(served.service.delete(served.who(), "secret")),
        lambda: wait(served.service.point(served.who(), "secret", "x", "1")),
        lambda: wait(served.service.unload(served.who(), "secret", {})),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(Forbidden):
        served.service.task(served.who(), "secret", tenant="rival")
    seen = {document["name"] for document in asyncio.run(served.service.index(served.who()))}
    assert "mood" in seen
    assert "partial" in seen
    assert "secret" not in seen


def test_versions_swap_roll_back_and_go(served: Served, others: list[Adapter]) -> None:
    for adapter in others[:2]:
        register(served, adapter)
    close(ask(served).outputs["logits"], merged(others[1]))
    service, who = served.service, served.who()
    wait(service.rollback(who, "mood", "current"))
    close(ask(served).outputs["logits"], merged(others[0]))
    wait(service.point(who, "mood", "canary", "2"))
    close(ask(served, version="canary").outputs["logits"], merged(others[1]))
    with pytest.raises(Conflict, match="canary"):
        wait(service.delete(who, "mood", "2"))
    wait(service.delete(who, "mood"))
    assert ("acme", "mood") in served.forgotten
    with pytest.raises(NotFound):
        ask(served)
    assert register(served, others[2])["versions"][0]["version"] == "3"


def test_uploads_that_are_not_fit_to_serve_leave_nothing(served: Served, others: list[Adapter]) -> None:
    module = nets.conv_net()[0]
    bias = dict(module.named_parameters())["head.bias"].detach().numpy()
    bad: list[tuple[dict[str, bytes], type[Exception]]] = [
        ({"weights": b"\x80\x04not safetensors"}, AdapterError),
        ({"weights": Adapter({}, overrides={"head.bias": bias}).to_bytes()}, AdapterError),
        ({"weights": Adapter({}, overrides={"other.bias": bias}).to_bytes()}, AdapterError),
        ({"weights": others[0].to_bytes()[:-8]}, AdapterError),
        ({"config": b"{}"}, ProtocolError),
        ({"model.onnx": b"x"}, ProtocolError),
    ]
    before = served.runtime.tasks
    for files, error in bad:
        with pytest.raises(error) as caught:
            wait(served.service.register(served.who(), "mood", upload(**files)))
        assert "/" not in str(caught.value)
    with pytest.raises(NotFound):
        ask(served)
    assert served.runtime.tasks == before
    assert not list((served.state.tasks._incoming).iterdir())
    for name in ("base", "conv", "partial"):
        with pytest.raises(Conflict):
            register(served, others[0], name=name)
    with pytest.raises(ProtocolError):
        register(served, others[0], name="../x")


def test_limits_of_uploads_and_quotas(served: Served, others: list[Adapter]) -> None:
    admin = served.who("operator", "admin")
    wait(served.service.admin.set_tenant(admin, "acme", {"adapters": 1}))
    register(served, others[0])
    with pytest.raises(QuotaExceeded, match="at most 1 adapters"):
        register(served, others[1])
    close(ask(served).outputs["logits"], merged(others[0]))
    wait(served.service.admin.set_tenant(admin, "acme", {"requests_per_s": 2}))
    for _ in range(2):
        ask(served)
    with pytest.raises(QuotaExceeded) as caught:
        ask(served)
    assert caught.value.retry_after is not None
    ask(served, "partial", tenant="other")
    served.service._management._max_upload_bytes = 1000
    with pytest.raises(TooLarge):
        register(served, others[1])


def test_what_was_registered_is_there_after_a_restart(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]
) -> None:
    own = serve(conv_bundle, tmp_path / "state")
    register(own, others[0])
    register(own, others[1])
    _, key = own.state.keys.create("acme", "infer", by="a test")
    own.runtime.close()
    own.state.close()
    again = serve(conv_bundle, tmp_path / "state")
    close(ask(again).outputs["logits"], merged(others[1]))
    assert again.service.authenticate(f"Bearer {key}").tenant == "acme"
    for header in (None, "", "Basic x", "Bearer", f"Bearer {key[:-1]}x"):
        with pytest.raises(Unauthenticated):
            again.service.authenticate(header)
    again.runtime.close()
    again.state.close()


def test_a_published_task_is_everybodys(served: Served, others: list[Adapter]) -> None:
    register(served, others[0])
    admin = served.who("operator", "admin")
    with pytest.raises(Forbidden):
        wait(served.service.publish(served.who(), "mood", "acme"))
    wait(served.service.publish(admin, "mood", "acme"))
    close(ask(served, tenant="third").outputs["logits"], merged(others[0]))
    with pytest.raises(Conflict):
        register(served, others[1], tenant="rival")
    actions = [entry["action"] for entry in wait(served.service.admin.audit(admin))]
    assert actions == ["publish", "register"]


def test_unloaded_models_say_so_until_they_are_loaded(served: Served, others: list[Adapter]) -> None:
    register(served, others[0])
    wait(served.service.unload(served.who(), "mood", {"unload_dependents": False}))
    with pytest.raises(Unavailable):
        ask(served)
    assert not served.service.model_ready(served.who(), "mood")
    wait(served.service.load(served.who(), "mood", {}))
    close(ask(served).outputs["logits"], merged(others[0]))
    with pytest.raises(Unsupported):
        wait(served.service.load(served.who(), "mood", {"config": "{}"}))
    with pytest.raises(Forbidden):
        wait(served.service.unload(served.who(), "partial", {}))


def test_statistics_count_what_was_answered(served: Served) -> None:
    for _ in range(3):
        ask(served, "partial")
    (own,) = asyncio.run(served.service.statistics(served.who(), "partial"))["model_stats"]
    assert own["inference_count"] == 12
    assert own["execution_count"] == 3
    for kind in ("success", "queue", "compute_infer"):
        assert own["inference_stats"][kind]["count"] == 3
    assert own["inference_stats"]["success"]["ns"] >= own["inference_stats"]["compute_infer"]["ns"] > 0


def test_a_drain_first_says_so_and_then_takes_nothing(served: Served) -> None:
    served.service.drain()
    assert not served.service.ready()
    assert not served.service.model_ready(served.who(), "partial")
    ask(served, "partial")
    served.service.refuse()
    with pytest.raises(Unavailable):
        ask(served, "partial")
