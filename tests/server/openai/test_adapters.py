from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.helpers.server.live import Live


def call(live: Live, verb: str, tenant: str = "acme", role: str = "deploy", **body: Any) -> httpx.Response:
    return live.ask("POST", f"/v1/{verb}_lora_adapter", tenant, role, json=body)


def listed(live: Live, tenant: str = "acme") -> dict[str, str | None]:
    found = live.ask("GET", "/v1/models", tenant, "infer").json()["data"]
    return {model["id"]: model["root"] for model in found}


def said(live: Live, model: str, tenant: str = "acme") -> str:
    key = live.keys[tenant, "infer"]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=100) as client:
        return client.completions.create(model=model, prompt="fox", max_tokens=8).choices[0].text


def test_an_adapter_is_loaded_served_replaced_and_unloaded(live: Live) -> None:
    digests = listed(live)
    answer = call(live, "load", lora_name="mine", lora_path="a")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert listed(live)["mine"] == digests["a"]
    assert "mine" not in listed(live, "rival")
    assert said(live, "mine") == said(live, "a") != said(live, "b")
    again = call(live, "load", lora_name="mine", lora_path="a")
    assert again.status_code == 400
    assert "already been loaded" in again.json()["error"]["message"]
    assert call(live, "load", lora_name="mine", lora_path=digests["b"], load_inplace=True).status_code == 200
    assert said(live, "mine") == said(live, "b")
    assert said(live, "mine@1") == said(live, "a")
    assert call(live, "load", lora_name="other", lora_path="mine@1").status_code == 200
    assert said(live, "other") == said(live, "a")
    answer = call(live, "unload", lora_name="mine")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert "mine" not in listed(live)
    with pytest.raises(openai.InternalServerError, match="unloaded"):
        said(live, "mine")
    # It stays registered, so it is a source, also of the model itself.
    assert call(live, "load", lora_name="mine", lora_path=f"sha256:{digests['b']}").status_code == 200
    assert said(live, "mine") == said(live, "b")
    versions = live.ask("GET", "/v2/registry/tasks/mine").json()["versions"]
    assert [version["version"] for version in versions] == ["1", "2"]
    for name in ("mine", "other"):
        assert live.ask("DELETE", f"/v2/registry/tasks/{name}").status_code == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "org/model", "file:///a", "s3://b/a", "a@1/..", "", "~"])
def test_paths_are_refused(live: Live, path: str) -> None:
    before = listed(live)
    answer = call(live, "load", lora_name="mine", lora_path=path)
    assert answer.status_code in ({404} if path == "a@1/.." else {400})
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert listed(live) == before


def test_sources_and_names_of_others_are_not_there(live: Live) -> None:
    assert call(live, "load", "rival", lora_name="hidden", lora_path="a").status_code == 200
    digest = listed(live)["a"]
    assert call(live, "load", lora_name="mine", lora_path="hidden").status_code == 404
    assert call(live, "unload", lora_name="hidden").status_code == 404
    assert call(live, "load", lora_name="mine", lora_path="0" * 64).status_code == 404
    assert call(live, "load", role="infer", lora_name="mine", lora_path=digest).status_code == 403
    assert call(live, "unload", role="infer", lora_name="a").status_code == 403
    assert call(live, "unload", lora_name="a").status_code == 403  # all tenants share it
    assert call(live, "load", lora_name="base", lora_path="a").status_code == 409
    assert call(live, "load", lora_name="no/name", lora_path="a").status_code == 400
    assert call(live, "load", lora_name="mine").status_code == 400
    assert live.ask("DELETE", "/v2/registry/tasks/hidden", "rival").status_code == 200
