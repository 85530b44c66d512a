from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.helpers.server.live import Live, serving_bundle
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.v2.generate import GenerateBody
from tpeft_deploy.runtime.text.model_text import ModelText

PATHS = {"a": "a", "b/versions/1": "b", "base/versions/1": None, "talk": None, "a:0.7+b:0.3": {"a": 0.7, "b": 0.3}}


@pytest.fixture(scope="module")
def text(talking: Bundle) -> ModelText:
    return ModelText.open(talking)


@pytest.fixture(scope="module")
def live(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_bundle(talking, tmp_path_factory.mktemp("state")) as live:
        yield live


def expected(live: Live, text: ModelText, prompt: str, task: Any, most: int, **how: Any) -> str:
    """Text that the runtime generates."""
    tokens = text.encode(prompt)
    [made] = live.served.runtime.generate([tokens], task, max_new_tokens=most, sampling=text.sampling(**how))
    return text.decode([*tokens, *made])[len(text.decode(tokens)) :]


def ask(live: Live, path: str, body: Any, **more: Any) -> httpx.Response:
    return live.ask("POST", f"/v2/models/{path}", json=body, **more)


def events(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


@pytest.mark.parametrize("path", PATHS)
def test_a_text_is_continued_whole_and_as_a_stream(live: Live, text: ModelText, path: str) -> None:
    name, _, version = path.partition("/versions/")
    found = expected(live, text, "The quick fox", PATHS[path], 12, logit_bias={1: -100})
    parameters = {"max_tokens": 12, "logit_bias": {"1": -100}}
    answer = ask(
        live, f"{path}/generate", {"text_input": "The quick fox", "parameters": {**parameters, "stream": True}}
    )
    shown = "" if "+" in path else version or "1"
    head = {"model_name": name, "model_version": shown}
    assert answer.json() == {**head, "text_output": found, "finish_reason": "length"}
    pieces = events(
        ask(live, f"{path}/generate_stream", {"text_input": "The quick fox", **parameters, "stream": False})
    )
    assert "".join(piece["text_output"] for piece in pieces) == found
    assert len(pieces) > 3
    assert all(head.items() <= piece.items() for piece in pieces)
    assert [piece.get("finish_reason") for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_parameters_are_those_of_tritons_backends(live: Live, text: ModelText) -> None:
    how = {"temperature": "0.8", "top_p": "0.9", "seed": 5, "max_tokens": "9"}  # as texts, as vLLM's examples have them
    found = expected(live, text, "fox", "a", 9, temperature=0.8, top_p=0.9, seed=5)
    for body in ({"parameters": how}, how, {"parameters": {"sampling_parameters": json.dumps(how)}}):
        answer = ask(live, "a/generate", {"text_input": "fox", "bad_words": "", "stop_words": "", "id": "7", **body})
        assert answer.json()["text_output"] == found
    for name in ("adapter", "lora_name"):
        answer = ask(live, "base/generate", {"text_input": "fox", "parameters": {name: "b", "max_tokens": 5}})
        assert answer.json()["text_output"] == expected(live, text, "fox", "b", 5)
    whole = expected(live, text, "fox", "b", 20)
    answer = ask(live, "b/generate", {"text_input": "fox", "stop_words": [whole[3:5]], "max_tokens": 20})
    assert answer.json()["text_output"] == whole[: whole.index(whole[3:5])]
    assert answer.json()["finish_reason"] == "stop"
    long = "lazy dog " * 300  # read off the event loop
    answer = ask(live, "a/generate", {"text_input": long, "max_tokens": 3})
    assert answer.json()["text_output"] == expected(live, text, long, "a", 3)


@pytest.mark.parametrize(
    ("path", "change", "status", "message"),
    [
        ("nobody", {}, 404, "nobody"),
        ("a/versions/7", {}, 404, "version"),
        ("a/versions/1", {"adapter": "b"}, 400, "adapter"),
        ("a", {"text_input": 5}, 400, "text_input"),
        ("a", {"n": 2}, 400, "'n'"),
        ("a", {"temperature": "warm"}, 400, "temperature"),
        ("a", {"temperature": -1}, 400, "temperature"),
        ("a", {"bad_words": ["x"]}, 400, "bad_words"),
        ("a", {"logprobs": 1}, 400, "logprobs"),
        ("a", {"exclude_input_in_output": False}, 400, "exclude_input_in_output"),
        ("a", {"echo": True}, 400, "echo"),
        ("a", {"sampling_parameters": "[1]"}, 400, "sampling_parameters"),
        ("a", {"max_tokens": 5000}, 400, "tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_in_the_form_of_v2(
    live: Live, path: str, change: dict[str, Any], status: int, message: str
) -> None:
    for suffix in ("generate", "generate_stream"):
        answer = ask(live, f"{path}/{suffix}", {"text_input": "x", **change})
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
        assert message in answer.json()["error"]
        assert "\n" not in answer.json()["error"]


def test_no_value_of_a_parameter_is_an_internal_error(live: Live) -> None:
    odd: list[Any] = [None, True, -1, 1.5, 1 << 70, "", "x", "nan", "null", [], [[]], {}, {"a": 1}]
    for name in GenerateBody.__struct_fields__:
        for value in odd:
            answer = ask(live, "a/generate", {"text_input": "x", "max_tokens": 1, "parameters": {name: value}})
            assert answer.status_code in {200, 400, 404}, (name, value, answer.text)
            if answer.status_code == 200:
                assert isinstance(answer.json()["text_output"], str)
    assert ask(live, "a/generate", {"text_input": "x", "parameters": 5}).status_code == 400
    assert live.ask("POST", "/v2/models/a/generate", content=b'{"text_input": "\\ud800"}').status_code == 400


def test_a_client_that_leaves_ends_its_sequence(live: Live) -> None:
    body = {"text_input": "x", "max_tokens": 900, "logit_bias": {"1": -100}}
    path = "/v2/models/a/generate_stream"
    with live.client.stream("POST", path, json=body, headers=live.headers(), timeout=100) as answer:
        next(answer.iter_bytes())

    def stats() -> Any:
        return live.served.runtime.generation()

    wait_until(lambda: stats().cancelled == 1, "that its sequence ends")
    wait_until(lambda: live.exchanges[-1].status == 499, "that it is told")


@pytest.mark.parametrize(("path", "tenant"), [("a/generate", "acme"), ("b/generate_stream", "rival")])
def test_tokens_are_spent_and_unused_ones_given_back(live: Live, path: str, tenant: str) -> None:
    def limited(**quota: float) -> None:
        assert live.ask("PUT", f"/v2/admin/tenants/{tenant}", "operator", "admin", json=quota).status_code == 200

    def asked(most: int) -> httpx.Response:
        body = {"text_input": "x", "max_tokens": most, "logit_bias": {"1": 100}}  # ends with the first token
        return live.ask("POST", f"/v2/models/{path}", tenant, "infer", json=body)

    limited(tokens_per_min=1)
    answer = asked(80)  # more than a minute's worth, of a full quota
    assert (answer.status_code, answer.headers["x-ratelimit-limit-tokens"]) == (200, "1")
    refused = asked(80)
    assert (refused.status_code, "1 tokens a minute" in refused.text) == (429, True)
    assert int(refused.headers["retry-after"]) < 1000  # 80 tokens would be 4,800
    limited()
