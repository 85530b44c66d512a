"""Calls for generated text and embeddings, in the form of OpenAI's API."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tpeft_deploy.client.answers import Answer, Document, document
from tpeft_deploy.client.body import RequestBody
from tpeft_deploy.client.exchange import Payload, ServerCall
from tpeft_deploy.client.url import affinity
from tpeft_deploy.errors import InputError, ServerError
from tpeft_deploy.tucker import Array

__all__ = ["Completion", "Messages", "Prompt", "chat", "embed", "generate"]

Messages = str | Sequence[Mapping[str, object]]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Array


@dataclass(frozen=True)
class Completion:
    """Generated texts.

    Attributes:
        texts: texts of all prompts, `n` for each.
        reasons: reason of each text's end: "stop" or "length".
        usage: numbers of tokens: `prompt_tokens`, `completion_tokens` and `total_tokens`.
        document: the whole answer in OpenAI's form, with log-probabilities.
    """

    texts: list[str]
    reasons: list[str]
    usage: Document
    document: Document

    @property
    def text(self) -> str:
        """The first text."""
        return self.texts[0]

    def __str__(self) -> str:
        return self.text


def chat(messages: Messages, model: str, options: Mapping[str, object], *, stream: bool) -> ServerCall[Completion]:
    """Ask for the answer to a conversation; arguments as `Client.chat`."""
    doing = f"answer a chat with model {model!r}"
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _generation(doing, "/v1/chat/completions", {"model": model, "messages": given}, options, stream)


def generate(prompt: Prompt, model: str, options: Mapping[str, object], *, stream: bool) -> ServerCall[Completion]:
    """Ask for the continuation of prompts; arguments as `Client.generate`."""
    doing = f"generate text with model {model!r}"
    several = not isinstance(prompt, str) and len(prompt) > 1 and not isinstance(prompt[0], int | np.integer)
    if stream and several:
        raise InputError(doing, expected="one prompt with stream=True", got=len(prompt))
    return _generation(doing, "/v1/completions", {"model": model, "prompt": prompt}, options, stream)


def embed(texts: Prompt, model: str, options: Mapping[str, object]) -> ServerCall[Array]:
    """Ask for embeddings; arguments as `Client.embed`."""
    doing = f"embed texts with model {model!r}"
    fields = {"model": model, "input": texts}
    # Numbers in JSON are three times as long, and slow to read.
    body = _encoded(doing, fields, {"encoding_format": "base64", **options})
    return ServerCall(
        doing, "POST", "/v1/embeddings", partial(_embeddings, doing), payload=partial(_payload, model, body)
    )


def _generation(
    doing: str, path: str, fields: Mapping[str, object], options: Mapping[str, object], stream: bool
) -> ServerCall[Completion]:
    added: dict[str, object] = {}
    if stream:
        if options.get("n") not in (None, 1):
            raise InputError(doing, expected="n=1 with stream=True", got=f"n={options['n']!r}")
        added = {"stream": True, "stream_options": {"include_usage": True}}
    body = _encoded(doing, {**fields, **added}, options)
    return ServerCall(
        doing, "POST", path, partial(_completion, doing), payload=partial(_payload, str(fields["model"]), body)
    )


def _encoded(doing: str, fields: Mapping[str, object], options: Mapping[str, object]) -> bytes:
    taken = sorted({*fields, "stream", "stream_options"} & set(options))
    if taken:
        raise InputError(doing, expected="further fields of the request", got=", ".join(taken))
    try:
        return json.dumps({**fields, **options}, allow_nan=False, default=_listed).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(doing, expected="values of JSON types", problem=str(error)) from error


def _listed(value: Any) -> object:
    """Return a NumPy array or number as JSON types."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"got {type(value).__name__}")


def _payload(model: str, body: bytes, left: float | None) -> Payload:
    return Payload({"Content-Type": "application/json", **affinity(model)}, RequestBody([body]))


def _completion(doing: str, answer: Answer) -> Completion:
    found = document(answer)
    try:
        choices = sorted(found["choices"], key=lambda choice: choice["index"])
        texts = [one["message"]["content"] or "" if "message" in one else one["text"] for one in choices]
        return Completion(texts, [one["finish_reason"] for one in choices], found["usage"], found)
    except (LookupError, TypeError) as error:
        raise ServerError(doing, expected="generated text", got=repr(found)[:120]) from error


def _embeddings(doing: str, answer: Answer) -> Array:
    found = document(answer)
    try:
        entries = sorted(found["data"], key=lambda entry: entry["index"])
        return np.stack([_vector(entry["embedding"]) for entry in entries])
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(doing, expected="embeddings of one size", got=repr(found)[:120]) from error


def _vector(value: Any) -> Array:
    return (
        np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        if isinstance(value, str)
        else np.array(value, np.float32)
    )
