"""Text through both clients: every text is the runtime's for the same tokens; streams, and how they end."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.helpers.server.client_calls import BOTH, Calling, Hours
from tests.helpers.server.live import Live, serving_bundle
from tests.helpers.waiting import wait_until
from tpeft_deploy import AsyncClient, Bundle, Client, errors
from tpeft_deploy.runtime.text.model_text import ModelText

URL = "http://server:1"
CHAT: Any = [{"role": "user", "content": "The quick fox"}]
END = {"logit_bias": {"1": -100}}  # no text ends early


@pytest.fixture(scope="module")
def live(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_bundle(talking, tmp_path_factory.mktemp("state")) as live:
        yield live


@pytest.fixture(scope="module")
def text(talking: Bundle) -> ModelText:
    return ModelText.open(talking)


@pytest.fixture(params=BOTH)
def call(request: pytest.FixtureRequest) -> Calling:
    return BOTH[request.param]


def streamed(start: Any) -> Any:
    """Reads a stream of either client: its pieces, reason and usage."""

    def use(client: Any) -> Any:
        begun = start(client)
        if isinstance(client, Client):
            with begun as stream:
                return list(stream), stream.reason, stream.usage

        async def read() -> Any:
            async with await begun as stream:
                return [piece async for piece in stream], stream.reason, stream.usage

        return read()

    return use


def expected(live: Live, text: ModelText, tokens: list[int], task: Any, most: int, **how: Any) -> str:
    [made] = live.served.runtime.generate([tokens], task, max_new_tokens=most, sampling=text.sampling(**how))
    return text.decode(made)


@pytest.mark.parametrize(("model", "task"), [("base", None), ("b@1", "b"), ("a:0.7+b:0.3", {"a": 0.7, "b": 0.3})])
def test_texts_are_the_runtimes(call: Calling, live: Live, text: ModelText, model: str, task: Any) -> None:
    known: dict[str, Any] = {"max_tokens": 9, **END}
    prompts = ["fox", "a lazy dog"]
    chat, again, several, tokens, pieces, more = call(
        live.url,
        [
            lambda client: client.chat(CHAT, model, **known),
            lambda client: client.chat("The quick fox", model, **known),
            lambda client: client.generate(prompts, task=model, **known),
            lambda client: client.generate(np.array(text.encode("fox")), model, **known),
            streamed(lambda client: client.chat(CHAT, model, stream=True, **known)),
            streamed(lambda client: client.generate("fox", model, stream=True, **known)),
        ],
        key=live.keys["acme", "infer"],
    )
    wanted = expected(live, text, text.chat(CHAT), task, 9, logit_bias={1: -100})
    assert chat.texts == again.texts == [wanted]
    assert (str(chat), chat.reasons) == (wanted, ["length"])
    assert chat.usage["completion_tokens"] == 9
    assert chat.document["object"] == "chat.completion"
    continued = [expected(live, text, text.encode(p), task, 9, logit_bias={1: -100}) for p in prompts]
    assert several.texts == continued
    assert tokens.text == continued[0]
    for (found, reason, usage), whole, answer in [(pieces, wanted, chat), (more, continued[0], tokens)]:
        assert len(found) > 1
        assert "".join(found) == whole
        assert (reason, usage) == ("length", answer.usage)


def test_a_stream_that_is_closed_early_ends_its_sequence(call: Calling, live: Live) -> None:
    def stats() -> Any:
        return live.served.runtime.generation()

    def first(client: Any) -> Any:
        begun = client.generate("x", "a", stream=True, max_tokens=900, **END)
        if isinstance(client, Client):
            with begun as stream:
                return next(stream)

        async def read() -> str:
            async with await begun as stream:
                return await anext(stream)

        return read()

    live.served.runtime.open_generation()
    cancelled = stats().cancelled
    [piece] = call(live.url, [first], key=live.keys["acme", "infer"])
    assert piece
    wait_until(lambda: stats().cancelled == cancelled + 1, "that its sequence ends")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"task": "nobody"}, errors.NotFound, "nobody"),
        ({"max_tokens": 5000}, errors.InputError, "at most 1025 tokens"),
        ({"temperature": float("nan")}, errors.InputError, "JSON"),
        ({"stop": object()}, errors.InputError, "got object"),
        ({"model": "a"}, errors.InputError, "further fields of the request, got model"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, errors.InputError, "read a body"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_errors_of_the_package(
    call: Calling, live: Live, change: Any, kind: type[Exception], text: str, stream: bool
) -> None:
    known = {"messages": CHAT, "stream": stream, **change}
    with pytest.raises(kind, match=text):
        call(live.url, [lambda client: client.chat(**known)], key=live.keys["acme", "infer"])


def test_a_stream_takes_one_sequence(call: Calling) -> None:
    for asked in ({"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"prompt": "a", "n": 2}):
        with pytest.raises(errors.InputError, match="with stream=True"):
            call(URL, [lambda client, asked=asked: client.generate(stream=True, **asked)])


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\r\n\r\n"


def piece(text: str, reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": reason}])


class Steps(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in chunks, or with an error at its end."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self.chunks = chunks
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def __aiter__(self) -> Any:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


def answered(call: Calling, body: Steps, hours: Hours | None = None) -> Any:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
    use = streamed(lambda client: client.generate("x", stream=True))
    return call(URL, [use], hours, transport=transport)[0]


def test_events_are_read_in_any_pieces(call: Calling) -> None:
    whole = b": comment\n" + piece("ä", None) + piece("") + piece("b", "stop") + event(choices=[], usage={"n": 3})
    whole += b"data:[DONE]\n\n"
    assert answered(call, Steps(*(bytes([byte]) for byte in whole))) == (["ä", "b"], "stop", {"n": 3})
    assert answered(call, Steps(whole)) == (["ä", "b"], "stop", {"n": 3})


@pytest.mark.parametrize(
    ("chunks", "kind", "text"),
    [
        ([], errors.Unavailable, "before the text's end"),
        ([httpx.ReadError("gone")], errors.Unavailable, "lost: gone"),
        ([httpx.ReadTimeout("late")], errors.DeadlineExceeded, "within 30 s"),
        ([b"data: {}\n"], errors.ServerError, "an event of generated text"),
        ([b"data: nothing\n"], errors.ServerError, "an event of generated text"),
        ([event(error={"message": "it stops", "type": "service_unavailable_error"})], errors.Unavailable, "^it stops"),
        ([event(error={"message": "slow", "type": "rate_limit_error"})], errors.QuotaExceeded, "^slow"),
        ([event(error="odd")], errors.ServerError, "^odd"),
    ],
)
def test_a_stream_that_breaks_is_an_error(call: Calling, chunks: Any, kind: type[Exception], text: str) -> None:
    body = Steps(piece("a"), *chunks)
    with pytest.raises(kind, match=text):
        answered(call, body)
    assert body.closed


def test_a_stream_is_tried_again_until_it_begins(call: Calling) -> None:
    hours, busy = Hours(), {"message": "queue is full", "type": "service_unavailable_error"}
    answers = [
        httpx.Response(503, json={"error": busy}, headers={"Retry-After": "2"}),
        httpx.Response(200, stream=Steps(piece("a", "stop"), b"data: [DONE]\n\n")),
    ]
    use = streamed(lambda client: client.generate("x", stream=True))
    transport = httpx.MockTransport(lambda _: answers.pop(0))
    assert call(URL, [use], hours, transport=transport)[0][0] == ["a"]
    assert hours.slept == [2.0]
    full = httpx.MockTransport(lambda _: httpx.Response(503, json={"error": busy}))
    with pytest.raises(errors.QueueFull, match="queue is full"):
        call(URL, [use], Hours(), transport=full)


def test_many_streams_at_once_each_have_their_own_text(live: Live, text: ModelText) -> None:
    prompts = [(f"fox {number}", task) for number, task in enumerate(["a", "b", "base", "a", "b"])]

    async def run() -> list[str]:
        async with AsyncClient(live.url, live.keys["acme", "infer"]) as client:

            async def one(prompt: str, task: str) -> str:
                stream = await client.generate(prompt, task, stream=True, max_tokens=9)
                return "".join([piece async for piece in stream])

            return await asyncio.gather(*(one(*own) for own in prompts))

    assert asyncio.run(run()) == [
        expected(live, text, text.encode(prompt), None if task == "base" else task, 9) for prompt, task in prompts
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_are_rows_in_the_order_of_the_texts(call: Calling, packed: bool) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        data = [
            {"index": at, "embedding": base64.b64encode(row.tobytes()).decode() if packed else row.tolist()}
            for at, row in enumerate(rows)
        ]
        return httpx.Response(200, json={"object": "list", "data": data[::-1]})

    use = lambda client: client.embed(["a", "b"], "sketches", dimensions=5)  # noqa: E731
    (found,) = call(URL, [use], transport=httpx.MockTransport(answer))
    np.testing.assert_array_equal(found, rows, strict=True)
    assert found.flags.writeable
    fields = {"model": "sketches", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 5}
    assert sent == [fields]


@pytest.mark.parametrize("wrong", [{}, {"data": []}, {"data": [{"index": 0, "embedding": "?"}]}, {"data": 3}])
def test_an_answer_without_embeddings_is_an_error(call: Calling, wrong: Any) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=wrong))
    with pytest.raises(errors.ServerError, match="embeddings of one size"):
        call(URL, [lambda client: client.embed("a")], transport=transport)
    with pytest.raises(errors.ServerError, match="generated text"):
        call(URL, [lambda client: client.chat("a")], transport=transport)
