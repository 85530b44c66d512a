"""The `openai` package against a live server: every text is the runtime's for the same tokens."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.helpers.server.live import Live, running, serving_bundle
from tests.helpers.waiting import wait_until
from tests.server.conftest import serve
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.generation.decoder import BankedDecoder
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.sampling import Token
from tpeft_deploy.runtime.text.model_text import ModelText

CHAT: Any = [{"role": "user", "content": "The quick fox"}]
TASKS = {"base": None, "talk": None, "a": "a", "b@1": "b", "a:0.7+b:0.3": {"a": 0.7, "b": 0.3}}
_CLIENTS: list[openai.OpenAI] = []


@pytest.fixture(scope="module")
def text(talking: Bundle) -> ModelText:
    return ModelText.open(talking)


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return client_of(live)


@pytest.fixture(autouse=True)
def _clients_are_closed() -> Iterator[None]:
    yield
    while _CLIENTS:
        _CLIENTS.pop().close()


def client_of(live: Live, tenant: str = "acme") -> openai.OpenAI:
    key = live.keys[tenant, "infer"]
    _CLIENTS.append(openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=100))
    return _CLIENTS[-1]


def expected(live: Live, text: ModelText, tokens: list[int], task: Any, most: int, **how: Any) -> str:
    """Text that the runtime generates."""
    [made] = live.served.runtime.generate([tokens], task, max_new_tokens=most, sampling=text.sampling(**how))
    return text.decode(made)


def generated(live: Live, text: ModelText, tokens: list[int], task: Any, most: int, **how: Any) -> list[Token]:
    async def run() -> list[Token]:
        request = GenerationRequest(tokens, most, text.sampling(**how), text=text.detokeniser())
        [handle] = await live.served.runtime.start(request, task)
        return (await asyncio.wrap_future(handle.future)).tokens

    return asyncio.run(run())


@pytest.mark.parametrize("model", TASKS)
def test_a_chat_is_answered_whole_and_as_a_stream(
    live: Live, client: openai.OpenAI, text: ModelText, model: str
) -> None:
    tokens = text.chat(CHAT)
    stop = text.facts.stop_tokens[0]
    wanted = expected(live, text, tokens, TASKS[model], 12, logit_bias={stop: -100})
    known: Any = {"model": model, "messages": CHAT, "logit_bias": {str(stop): -100}}
    answer = client.chat.completions.create(**known, max_tokens=12)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", wanted, "length")
    assert (answer.model, answer.object) == (model, "chat.completion")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokens), 12)
    usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**known, **usage, max_completion_tokens=12))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == answer.usage
    assert not chunks[-1].choices


def test_many_clients_at_once_each_get_their_own(live: Live, text: ModelText) -> None:
    prompts = [(f"fox {number}", task) for number, task in enumerate(["a", "b", "base", "a", "b"])]

    async def run() -> list[str]:
        key = live.keys["rival", "infer"]
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:

            async def one(prompt: str, task: str) -> str:
                found = ""
                stream = await client.completions.create(model=task, prompt=prompt, max_tokens=9, stream=True)
                async for chunk in stream:
                    found += chunk.choices[0].text
                return found

            return await asyncio.gather(*(one(*own) for own in prompts))

    wanted = [expected(live, text, text.encode(prompt), task, 9) for prompt, task in prompts]
    assert asyncio.run(run()) == wanted


def test_several_choices_are_sampled_apart_and_as_asked(live: Live, client: openai.OpenAI, text: ModelText) -> None:
    how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.4}
    how["frequency_penalty"] = 0.3
    more: dict[str, Any] = {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1}
    known: Any = {**how, "logit_bias": {"40": -5}, "extra_body": more}
    answer = client.chat.completions.create(model="a", messages=CHAT, max_tokens=8, n=3, **known)
    texts = [choice.message.content for choice in answer.choices]
    assert texts[0] == expected(live, text, text.chat(CHAT), "a", 8, **how, **more, logit_bias={40: -5})
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="a", messages=CHAT, max_tokens=8, n=3, stream=True, **known):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_a_stop_text_ends_the_answer_before_it(live: Live, client: openai.OpenAI, text: ModelText) -> None:
    whole = expected(live, text, text.encode("fox"), "b", 20)
    stop = whole[4:6]
    for stream in (False, True):
        answer: Any = client.completions.create(
            model="b", prompt="fox", max_tokens=20, stop=[stop, "zzzz"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_runtime(live: Live, client: openai.OpenAI, text: ModelText) -> None:
    tokens = generated(live, text, text.chat(CHAT), "a", 6, logprobs=3)
    known: Any = {"model": "a", "messages": CHAT, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**known).choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in content] == [text.token_bytes(token.id) for token in tokens]
    assert [entry.logprob for entry in content] == pytest.approx([token.logprob for token in tokens], abs=1e-5)
    tops = [[other.logprob for other in entry.top_logprobs] for entry in content]
    assert tops == [pytest.approx([logprob for _, logprob in token.top], abs=1e-5) for token in tokens]
    chunks: Any = client.chat.completions.create(**known, stream=True)
    streamed = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    found = client.completions.create(model="base", prompt="fox", max_tokens=5, logprobs=2).choices[0]
    assert found.logprobs is not None
    names = found.logprobs.tokens or []
    assert "".join(names) == found.text or "\ufffd" in "".join(names)
    assert found.logprobs.text_offset == [len("".join(names[:at])) for at in range(5)]


def test_prompts_are_texts_or_tokens_one_or_several(live: Live, client: openai.OpenAI, text: ModelText) -> None:
    texts = ["fox", "lazy dog " * 4]
    tokens = [text.encode(own) for own in texts]
    wanted = [expected(live, text, own, "a", 4) for own in tokens]
    prompts: Any
    for prompts in (texts, tokens):
        # A long body is read off the event loop.
        answer = client.completions.create(model="a", prompt=prompts, max_tokens=4, n=2, user="x" * 3000)
        assert [choice.text for choice in answer.choices] == [wanted[0], wanted[0], wanted[1], wanted[1]]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        one = client.completions.create(model="a", prompt=prompts[0], max_tokens=4)
        assert one.choices[0].text == wanted[0]


def test_names_of_special_tokens_in_messages_are_text(live: Live, client: openai.OpenAI, text: ModelText) -> None:
    chat: Any = [{"role": "user", "content": [{"type": "text", "text": "a</s>"}, {"type": "text", "text": "<|user|>"}]}]
    plain = [{"role": "user", "content": "a</s>\n<|user|>"}]
    for parse in (False, True):
        answer = client.chat.completions.create(
            model="a", messages=chat, max_tokens=5, extra_body={"parse_special": parse}
        )
        tokens = text.chat(plain, literal=not parse)
        assert (text.facts.stop_tokens[0] in tokens) == parse
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tokens)
        assert answer.choices[0].message.content == expected(live, text, tokens, "a", 5)


def test_tools_and_a_message_to_continue_go_to_the_template(live: Live, client: openai.OpenAI, text: ModelText) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    answer = client.chat.completions.create(model="a", messages=CHAT, max_tokens=5, tools=tools)
    assert answer.choices[0].message.content == expected(live, text, text.chat(CHAT, tools=tools), "a", 5)
    chat: Any = [*CHAT, {"role": "assistant", "content": "jumps"}]
    answer = client.chat.completions.create(
        model="a", messages=chat, max_tokens=5, extra_body={"continue_final_message": True}
    )
    tokens = text.chat(chat, add_generation_prompt=False, continue_final_message=True)
    assert answer.choices[0].message.content == expected(live, text, tokens, "a", 5)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "nobody"}, "model", "model_not_found"),
        ({"model": "a:x+b:1"}, None, None),
        ({"max_tokens": 5000}, None, "context_length_exceeded"),
        ({"temperature": -1}, "temperature", None),
        ({"messages": []}, None, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", None),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"response_format": {"type": "xml"}}, "response_format", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"n": 0}, "n", None),
        ({"tools": [1]}, "tools", None),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    body: Any = {"model": "a", "messages": CHAT, "max_tokens": 4, **change}
    kind = openai.NotFoundError if code == "model_not_found" else openai.BadRequestError
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**body)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert client.completions.create(model="a", prompt="x", max_tokens=1, echo=False).choices
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="a", prompt="x", suffix="y")


def test_an_echo_is_the_prompt_before_each_answer(client: openai.OpenAI, text: ModelText) -> None:
    texts = ["The fox", "dogs & cats </s>"]
    for prompt in (texts[0], texts, [text.encode(own) for own in texts], text.encode(texts[0])):
        known: Any = {"model": "a", "prompt": prompt, "max_tokens": 6, "n": 2, "temperature": 1, "seed": 1}
        plain = client.completions.create(**known)
        echoed = client.completions.create(**known, echo=True)
        several = texts if isinstance(prompt, list) and not isinstance(prompt[0], int) else texts[:1]
        before = [
            own if isinstance(prompt, str) or prompt is texts else text.decode(text.encode(own), special=True)
            for own in several
            for _ in range(2)
        ]
        wanted = [own + choice.text for own, choice in zip(before, plain.choices, strict=True)]
        assert [choice.text for choice in echoed.choices] == wanted
        assert echoed.usage == plain.usage
        pieces = [""] * len(wanted)
        for chunk in client.completions.create(**known, echo=True, stream=True):
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
        assert pieces == wanted
    with pytest.raises(openai.BadRequestError, match="no logprobs") as caught:
        client.completions.create(model="a", prompt="x", echo=True, logprobs=0)
    assert caught.value.param == "echo"


def test_keys_sizes_and_rates_have_their_errors(live: Live) -> None:
    with pytest.raises(openai.AuthenticationError) as denied:
        client_of(live).with_options(api_key="wrong").models.list()
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError, match="at most") as large:
        client_of(live).completions.create(model="a", prompt="x" * (17 << 20))
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    limit = {"requests_per_s": 0.001}
    assert live.ask("PUT", "/v2/admin/tenants/rival", "operator", "admin", json=limit).status_code == 200
    rival = client_of(live, "rival")
    known: Any = {"model": "a", "prompt": "x", "max_tokens": 1}
    answer = rival.completions.with_raw_response.create(**known)
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    with pytest.raises(openai.RateLimitError) as limited:
        rival.completions.create(**known)
    headers = limited.value.response.headers
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert int(headers["retry-after"]) > 100
    assert live.ask("PUT", "/v2/admin/tenants/rival", "operator", "admin", json={}).status_code == 200


def test_answers_in_a_schema_are_json_of_it_and_bad_schemas_are_refused(live: Live, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    words = {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3}
    schema = {"type": "object", "properties": {"words": words}, "required": ["words"], "additionalProperties": False}
    how: Any = {"messages": CHAT, "temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 200}
    form: Any = {"type": "json_schema", "json_schema": {"name": "words", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="a", **how, response_format=form)
    texts = [choice.message.content or "" for choice in answer.choices]
    assert all(set(json.loads(text)["words"]) <= {"red", "blue"} for text in texts)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="a", **how, response_format=form, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    known: Any = {"model": "b", "prompt": "x", "max_tokens": 300, "temperature": 1.0, "seed": 1}
    [made] = client.completions.create(**known, extra_body={"response_format": {"type": "json_object"}}).choices
    assert made.text.startswith("{")
    if made.finish_reason == "stop":
        json.loads(made.text)
    for bad in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**known, extra_body={"response_format": bad})
        assert refused.value.param == "response_format"
        assert "\n" not in str(refused.value.message)


def test_tokens_of_a_minute_are_reserved_given_back_and_refused(live: Live) -> None:
    def limited(tenant: str, **quota: float) -> None:
        assert live.ask("PUT", f"/v2/admin/tenants/{tenant}", "operator", "admin", json=quota).status_code == 200

    for tenant in ("acme", "rival"):
        limited(tenant, tokens_per_min=100)
    shown = {own["name"]: own["quota"] for own in live.ask("GET", "/v2/admin/tenants", "operator", "admin").json()}
    assert shown["rival"]["tokens_per_min"] == 100
    known: Any = {"model": "a", "prompt": [5, 6, 7]}
    for _ in range(2):  # ends with its first token, so that the others that it might generate are given back
        answer = client_of(live).completions.with_raw_response.create(**known, max_tokens=80, logit_bias={"1": 100})
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 92
    rival = client_of(live, "rival")
    stream = rival.completions.with_raw_response.create(**known, max_tokens=900, logit_bias={"1": -100}, stream=True)
    assert stream.headers["x-ratelimit-remaining-tokens"] == "0"
    assert float(stream.headers["x-ratelimit-reset-tokens"].removesuffix("s")) > 100
    with pytest.raises(openai.RateLimitError, match="100 tokens a minute") as refused:
        rival.completions.create(**known, max_tokens=1)
    headers = refused.value.response.headers
    assert (headers["x-ratelimit-remaining-tokens"], refused.value.code) == ("0", "rate_limit_exceeded")
    assert int(headers["retry-after"]) > 100
    assert len(list(stream.parse())) > 100
    for tenant in ("acme", "rival"):
        limited(tenant)


def test_models_are_listed_and_read(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"base", "talk", "a", "b"}
    assert client.models.retrieve("a").id == "a"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_sequences(live: Live, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own, go_on = BankedDecoder.decode, threading.Event()

    def held(decoder: BankedDecoder, *args: Any) -> Any:
        assert go_on.wait(120)
        return own(decoder, *args)

    def stats() -> Any:
        return live.served.runtime.generation()

    cancelled = 0 if stats() is None else stats().cancelled
    monkeypatch.setattr(BankedDecoder, "decode", held)
    body = {"model": "a", "prompt": ["x", "y"], "n": 2, "max_tokens": 900, "stream": stream, "logit_bias": {"1": -100}}
    text = json.dumps(body).encode()
    head = ["POST /v1/completions HTTP/1.1", "host: localhost", f"content-length: {len(text)}"]
    head += [f"{name}: {value}" for name, value in live.headers().items()]
    with socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall("\r\n".join([*head, "", ""]).encode() + text)
        wait_until(lambda: stats() is not None and stats().running + stats().waiting == 4, "its sequences")
    wait_until(lambda: bool(live.exchanges) and live.exchanges[-1].status == 499, "that it is told")
    go_on.set()
    wait_until(lambda: stats().cancelled == cancelled + 4, "that its sequences end")
    wait_until(lambda: stats().running == stats().waiting == 0, "free slots")
    assert live.served.runtime.usage()["slots_taken"] == 0


def test_a_server_that_drains_refuses_and_a_broken_stream_ends_with_an_error(talking: Bundle, tmp_path: Path) -> None:
    own = serve(talking, tmp_path / "state")
    with running(own) as live:
        client = client_of(live)
        known: Any = {"model": "a", "prompt": "x", "max_tokens": 900, "logit_bias": {"1": -100}}
        stream: Any = client.completions.create(**known, stream=True)
        next(stream)
        own.service.refuse()
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(**known)
        assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")
        own.runtime.close()
        with pytest.raises(openai.APIError):
            list(stream)
    own.state.close()


def test_a_bundle_without_text_says_so(conv_bundle: Bundle, tmp_path: Path) -> None:
    with serving_bundle(conv_bundle, tmp_path / "state") as live:
        with pytest.raises(openai.BadRequestError, match="it has no decoder"):
            client_of(live).chat.completions.create(model="base", messages=CHAT)
        assert set(json.loads(live.ask("GET", "/v1/nothing").content)["error"]) == {"message", "type", "param", "code"}
