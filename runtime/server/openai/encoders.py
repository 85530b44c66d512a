"""Embeddings and classification of texts."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from tpeft_deploy.bundle.text_files import STATES, Pooling
from tpeft_deploy.errors import InputError
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.runtime.server.openai.reading import Opened, admitted, encode
from tpeft_deploy.runtime.server.openai.text_bodies import ClassifyBody, EmbeddingBody, TextPair
from tpeft_deploy.runtime.server.operations.texts import TOKEN, ContextExceeded
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.rest.infer import Watch
from tpeft_deploy.runtime.server.v2.messages import Document
from tpeft_deploy.runtime.text.model_text import Encoding, ModelText
from tpeft_deploy.runtime.text.pooling import cut, pool
from tpeft_deploy.tucker import Array

__all__ = ["classify", "embeddings"]

_NUMBER = 24  # bytes of a number in an answer, and of the array that it was
_CLASS = 4  # numbers that a class of an answer takes the memory of, its label included
_STATES = 1 << 14  # tokens with states in memory at the same time


async def embeddings(context: HttpContext) -> object:
    """Serve `POST /v1/embeddings`."""

    async def answered() -> object:
        reading, body, target, text = await Opened.of(context, EmbeddingBody, "embed text", encoder=True)
        pooling = text.facts.pooling
        if pooling is None:
            raise InputError(
                "embed text with this bundle",
                problem="it records no pooling",
                fix="Export it with pooling= (cls, mean or last).",
            )
        encoders = context.core.generations.encoders
        port = encoders.output(STATES, 3, "embed text")
        width = int(port.shape[-1])
        size = _size(body.dimensions, width, pooling)
        texts = await reading.run(_tokens, text, body, pooling)
        _hold(context, texts, width)
        run = encoders.run(context.principal, target, texts, port, partial(pool, pooling=pooling), context.traceparent)
        found = await Watch().cancel_on_disconnect(run, context.receive)
        encoded = partial(_embeddings, body, found, size, pooling, _usage(texts))
        return await encode(context, encoded, len(texts) * size)

    return await admitted(context, answered)


async def classify(context: HttpContext) -> object:
    """Serve `POST /v1/classify`."""

    async def answered() -> object:
        reading, body, target, text = await Opened.of(context, ClassifyBody, "classify text", encoder=True)
        encoders = context.core.generations.encoders
        port = encoders.output("logits", 2, "classify text")
        labels = await encoders.labels(context.principal, target)
        texts = await reading.run(_pairs, text, body)
        _hold(context, texts, 1)
        run = encoders.run(context.principal, target, texts, port, np.asarray, context.traceparent)
        found = await Watch().cancel_on_disconnect(run, context.receive)
        _hold(context, texts, _CLASS * max(logits.size for logits in found))
        encoded = partial(_classes, body.model, context.request_id, found, labels, _usage(texts))
        return await encode(context, encoded, sum(logits.size for logits in found))

    return await admitted(context, answered)


def _tokens(text: ModelText, body: EmbeddingBody, pooling: Pooling) -> list[Encoding]:
    most = _most(text, body.truncate_prompt_tokens)
    found = []
    for own in body.inputs:
        if isinstance(own, str):
            given = text.encoding(
                pooling.prompt + own, special=body.add_special_tokens, literal=not body.parse_special, most=most
            )
        else:
            given = Encoding(own[:most], [0] * len(own[:most]))
        found.append(_fitting(given, text))
    return found


def _pairs(text: ModelText, body: ClassifyBody) -> list[Encoding]:
    most = _most(text, body.truncate_prompt_tokens)

    def encoded(own: TextPair) -> Encoding:
        how = {"special": body.add_special_tokens, "literal": not body.parse_special}
        return _fitting(text.encoding(own.text, own.text_pair, most=most, **how), text)

    return [encoded(own) for own in body.inputs]


def _most(text: ModelText, given: int | None) -> int | None:
    """Return the number of tokens behind which texts are cut; -1 asks for the model's limit."""
    limit = text.facts.most_tokens
    return limit if given == -1 else given if given is None or limit is None else min(given, limit)


def _fitting(given: Encoding, text: ModelText) -> Encoding:
    count, most = len(given.ids), text.facts.most_tokens
    if not count:
        raise InputError("read field 'input'", expected="at least one token", got="a text of none")
    if most is not None and count > most:
        raise ContextExceeded(
            "read field 'input'",
            expected=f"at most {most} tokens",
            got=f"a text of {count}",
            fix="Shorten it, or cut it with truncate_prompt_tokens=-1.",
        )
    return given


def _size(asked: int | None, width: int, pooling: Pooling) -> int:
    if asked is None or asked == width or asked in pooling.dimensions:
        return width if asked is None else asked
    known = ", ".join(map(str, sorted({*pooling.dimensions, width})))
    raise InputError("read field 'dimensions'", expected=f"a size that the model was trained for ({known})", got=asked)


def _hold(context: HttpContext, texts: Sequence[Encoding], width: int) -> None:
    tokens = sum(len(own.ids) for own in texts)
    states = min(tokens, _STATES) * width * 4
    context.memory.resize(context.bytes_in + 2 * TOKEN * tokens + states + _NUMBER * width * len(texts))


def _usage(texts: Sequence[Encoding]) -> Document:
    tokens = sum(len(own.ids) for own in texts)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _embeddings(body: EmbeddingBody, found: Sequence[Array], size: int, pooling: Pooling, usage: Document) -> Document:
    arrays = [np.ascontiguousarray(cut(own, size, pooling) if size < own.size else own) for own in found]
    values: Sequence[object] = arrays
    if body.encoding_format == "base64":
        values = [base64.b64encode(own.astype("<f4").tobytes()).decode() for own in arrays]
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _classes(model: str, id: str, found: Sequence[Array], labels: HeadLabels | None, usage: Document) -> Document:
    data = [{"index": index, **_class(logits, labels or HeadLabels())} for index, logits in enumerate(found)]
    head = {"id": f"classify-{id}", "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": usage}


def _class(logits: Array, labels: HeadLabels) -> Document:
    count = logits.size
    names = labels.names if len(labels.names) == count else [f"LABEL_{index}" for index in range(count)]
    problem = labels.problem or ("regression" if count == 1 else "single_label_classification")
    wide = logits.astype(np.float64)
    known = {"num_classes": count, "labels": list(names), "problem_type": problem}
    if problem == "regression":
        return {"label": None, "probs": None, "values": wide, **known}
    with np.errstate(over="ignore"):
        raised = np.exp(wide - wide.max()) if problem == "single_label_classification" else 1 / (1 + np.exp(-wide))
    probs = raised / raised.sum() if problem == "single_label_classification" else raised
    return {"label": names[int(probs.argmax())], "probs": probs, "values": None, **known}
