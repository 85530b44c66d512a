"""Requests that nobody would send, over HTTP: none is an internal error, and the event loop goes on.

A small number in every run of the tests; 10,000 with `make soak`.
"""

from __future__ import annotations

import gzip
import json
import random
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.helpers.server.encoder_bundles import embedding_bundle
from tests.helpers.server.live import Live, running, serving_bundle
from tests.server.conftest import PIXELS, serve
from tpeft_deploy import Adapter, Bundle

NAMES = ["mood", "base", "conv", "secret", "two", "", "..", "%2e%2e", "..%2f..%2fetc", "%00", "é", "a" * 300, "mood@9"]
SIZES = [0, 1, -1, 2, 4, 12, 14, 1 << 31, 1 << 63, 1 << 70, None, "4", 1.5, True]
DATATYPES = ["FP32", "FP64", "INT64", "BOOL", "BYTES", "BF16", "FP16", "FP99", "", None, 7]
ODD: list[Any] = [None, True, -1, 1.5, "x", [], {}, [[]], {"a": 1}, "\ud800", 1 << 70]


@pytest.fixture(scope="module")
def live(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, others: list[Adapter]) -> Iterator[Live]:
    own = serve(conv_bundle, tmp_path_factory.mktemp("fuzz") / "state")
    with running(own) as found:
        assert found.register(others[0]).status_code == 200
        assert found.register(others[1], "secret", "rival").status_code == 200
        yield found
    own.runtime.close()
    own.state.close()


@contextmanager
def watched(live: Live) -> Iterator[list[int]]:
    """With which statuses the server's health was answered meanwhile."""
    found: list[int] = []
    over = threading.Event()

    def watch() -> None:
        with httpx.Client() as client:
            while not over.wait(0.02):
                found.append(client.get(live.url + "/v2/health/live", timeout=100).status_code)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def spoil(tensor: dict[str, Any], kind: int, size: int, choice: random.Random) -> None:
    """Another shape, datatype, size, or elements in two places."""
    if kind == 0:
        tensor["shape"] = [choice.choice(SIZES) for _ in range(choice.randrange(6))]
    elif kind == 1:
        tensor["datatype"] = choice.choice(DATATYPES)
    elif kind == 2:
        tensor["parameters"] = {"binary_data_size": choice.choice([*SIZES, size + 4, size - 4])}
    elif kind == 3:
        tensor["data"] = choice.choice([*ODD, PIXELS.tolist(), PIXELS.ravel().tolist()])
        if choice.random() < 0.5:
            tensor.pop("parameters", None)


def mutated(choice: random.Random) -> tuple[bytes, dict[str, str]]:
    """A request with binary framing, with some of it wrong."""
    raw = PIXELS.tobytes()
    tensor: dict[str, Any] = {
        "name": "pixels",
        "shape": list(PIXELS.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(raw)},
    }
    document: dict[str, Any] = {
        "inputs": [tensor],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    for _ in range(choice.choice([0, 1, 1, 2, 3])):
        kind = choice.randrange(10)
        if kind < 4:
            spoil(tensor, kind, len(raw), choice)
        elif kind == 4:
            document[choice.choice(["id", "parameters", "outputs", "inputs", "more", "model_name"])] = choice.choice(
                ODD
            )
        elif kind == 5:
            parameter = choice.choice(["adapter", "timeout", "priority", "binary_data_output", "sequence_id", "x"])
            document["parameters"] = {parameter: choice.choice([*ODD, "two", "secret", 1, 0])}
        elif kind == 6:
            rows = choice.choice([["two"], ["mood", "x", "two", "base"], [""], [1]])
            names = {"name": "adapter", "shape": [choice.choice(SIZES)], "datatype": "BYTES", "data": rows}
            document["inputs"] = [tensor, names]
        elif kind == 7:
            document["inputs"] = [tensor] * choice.choice([0, 2, 300])
        elif kind == 8:
            raw = choice.choice([b"", raw[:-1], raw + b"\0", bytes(len(raw)), b"\xff" * len(raw)])
        else:
            document["outputs"] = [{"name": choice.choice(["logits", "none", "", "logits.0"])}] * choice.choice([1, 2])
    return framed(document, raw, choice)


def framed(document: dict[str, Any], raw: bytes, choice: random.Random) -> tuple[bytes, dict[str, str]]:
    """Its bytes and headers, which may be wrong too."""
    text = json.dumps(document).encode()
    length: object = len(text)
    if choice.random() < 0.15:
        length = choice.choice([0, -1, len(text) - 1, len(text) + 1, 1 << 40, "x", "", "1e3", "0x10"])
    headers = {"Inference-Header-Content-Length": str(length)}
    body = text + raw
    if choice.random() < 0.2:
        at = choice.randrange(len(body))
        body = body[:at] + choice.randbytes(choice.randrange(8)) + body[at + choice.randrange(8) :]
    if choice.random() < 0.15:
        kind = choice.choice(["gzip", "deflate", "br", "gzip, gzip", "identity"])
        body = gzip.compress(body) if kind == "gzip" else zlib.compress(body) if kind == "deflate" else body
        body = body[: choice.choice([len(body), len(body) // 2])]
        headers["Content-Encoding"] = kind
    if choice.random() < 0.1:
        headers[choice.choice(["X-Adapter", "traceparent", "X-Request-Id"])] = choice.choice(
            ["two", "secret", "x" * 4000]
        )
    return body, headers


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_no_request_with_binary_framing_is_an_internal_error(live: Live, count: int) -> None:
    choice = random.Random(count)
    seen: Counter[int] = Counter()
    own = live.headers("acme", "infer")
    with watched(live) as health, httpx.Client(base_url=live.url, timeout=100) as client:
        for _ in range(count):
            body, headers = mutated(choice)
            path = f"/v2/models/{choice.choice(['mood'] * 12 + NAMES)}"
            path += choice.choice(["", "", "", "/versions/1", "/versions/9", "/versions/%2e"]) + "/infer"
            answer = client.post(path, content=body, headers=own | headers)
            seen[answer.status_code] += 1
            # 504: some ask for their answer within microseconds.
            assert answer.status_code < 500 or answer.status_code in {501, 504}, (body[:500], headers, answer.text)
            if answer.status_code != 200:
                assert set(answer.json()) == {"error"}
                assert "rival" not in answer.text
                assert "\n" not in answer.json()["error"]
    assert {200, 400, 404, 413} <= set(seen), seen
    assert set(health) == {200}
    assert live.served.runtime.batching().waiting_rows == 0


def no_internal_error(ctx: Any, answer: Any, case: Any) -> bool | None:
    """As schemathesis has it, but for what a server may say of a part of the protocol that it has not."""
    return None if answer.status_code == 501 else not_a_server_error(ctx, answer, case)


def _described(live: Live) -> list[Any]:
    document = live.ask("GET", "/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=live.url)
    return [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]  # raises where it is none


def _asked(live: Live, operations: list[Any], count: int, prepare: Callable[[Any], None] = lambda _: None) -> set[str]:
    """Send requests that schemathesis makes from the document, with the role that may do most.

    Args:
        live: server.
        operations: operations of the document.
        count: number of requests for each.
        prepare: changes a request before it is sent.

    Returns:
        Operations with a request that was served.
    """
    checked = [
        no_internal_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    sent, served = Counter[str](), set[str]()
    own = live.headers("operator", "admin")
    with watched(live) as health:
        for operation in operations:

            @settings(
                max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def ask(case: Any) -> None:
                prepare(case)
                answer = case.call(headers=own)
                sent[case.operation.label] += 1
                served.update([case.operation.label] if answer.status_code == 200 else [])
                case.validate_response(answer, checks=checked)

            ask()
    assert live.ask("GET", "/v2").status_code == 200
    assert set(health) == {200}
    if count > 6:
        assert sent.total() > 5_000
    return served


@pytest.mark.parametrize("count", [6, pytest.param(400, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_what_the_document_describes_is_answered_as_it_says(live: Live, count: int) -> None:
    operations = _described(live)
    assert len(operations) > 20
    _asked(live, operations, count)


@pytest.fixture
def texts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    bundle = request.getfixturevalue("talking") if request.param == "a" else embedding_bundle(tmp_path)[0]
    with serving_bundle(bundle, tmp_path / "state") as live:
        yield live


GENERATED = ["/v1/chat/completions", "/v1/completions", "/v2/models/{model}/generate"]
GENERATED.append(f"{GENERATED[-1]}_stream")
ENCODED = ["/v1/embeddings", "/v1/tokenize", "/v1/detokenize"]
LONG = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("texts", "served", "count"),
    [
        ("a", [], 6),
        pytest.param("a", [*GENERATED, *ENCODED[1:]], 400, marks=LONG),
        pytest.param("law", ENCODED, 400, marks=LONG),
    ],
    indirect=["texts"],
)
def test_requests_on_texts_are_answered_as_the_document_says(texts: Live, served: list[str], count: int) -> None:
    """Most requests name a model that there is, so that they are read to their end, and generate little."""
    choice = random.Random(count)

    def prepare(case: Any) -> None:
        known = choice.choice(["a", "law", "base", "base", "nobody"])
        if "model" in (case.path_parameters or {}):
            case.path_parameters["model"] = known
        for body in (case.body, case.body.get("parameters") if isinstance(case.body, dict) else None):
            if isinstance(body, dict):
                body.update({"model": known} if "model" in body else {})
                body["max_tokens"] = choice.choice([1, 2, 3, 3, 0])
                if "messages" in body and choice.random() < 0.5:
                    body["messages"] = [{"role": "user", "content": "fox"}]

    operations = [own for own in _described(texts) if own.path.startswith("/v1/") or "generate" in own.path]
    assert {f"POST {path}" for path in served} <= _asked(texts, operations, count, prepare)
