"""Documents of answers in OpenAI's API, whole or in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpeft_deploy.runtime.generation.handle import Generated
from tpeft_deploy.runtime.generation.sampling import Token
from tpeft_deploy.runtime.server.openai.sse import DONE
from tpeft_deploy.runtime.server.openai.tool_answers import CallDocuments
from tpeft_deploy.runtime.server.openai.tools import CallReaders
from tpeft_deploy.runtime.server.v2.messages import Document

__all__ = ["AnswerDocuments", "ChatDocuments", "CompletionDocuments"]


class AnswerDocuments(ABC):
    """Documents of the answer to one request.

    Args:
        id: id of the request.
        model: model as the client named it.
        bytes_of: returns the bytes of a token's text.
        stops: tokens that end a sequence; they are no part of its text.
        top: number of most probable tokens to give with each token; None for no log-probabilities.
        version: version of the model; empty if there are several.
        before: text before each answer; empty for none.
        calls: how tool calls are read; None where an answer is text.

    Attributes:
        done: last event of a stream.
    """

    done = DONE
    object = ""
    chunk_object = ""
    prefix = ""

    def __init__(
        self,
        id: str,
        model: str,
        bytes_of: Callable[[int], bytes],
        stops: frozenset[int],
        top: int | None,
        version: str = "",
        before: Sequence[str] = (),
        calls: CallReaders | None = None,
    ) -> None:
        self._head = self._head_of(id, model, version)
        self._bytes_of = bytes_of
        self._stops = stops
        self._top = top
        self._before = before
        self._calls = calls

    @property
    def echoed(self) -> int:
        """Characters of the texts before answers."""
        return sum(map(len, self._before))

    def whole(self, results: Sequence[Generated], usage: Document) -> Document:
        """Return the document of a request that is not streamed."""
        before = self._before or [""] * len(results)
        choices = [
            self._choice(index, before[index] + own.text, self._logprobs(own.tokens), own.reason)
            for index, own in enumerate(results)
        ]
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[Document], usage: Document | None, *, with_usage: bool) -> Document:
        """Return the document of one event."""
        document = {**self._head, "object": self.chunk_object, "choices": list(choices)}
        return {**document, "usage": usage} if with_usage else document

    def begin(self, index: int) -> list[Document]:
        """Return the choices of a sequence in a stream before its tokens."""
        return [self._delta(index, self._before[index], None, None)] if self._before else []

    def deltas(self, index: int, token: Token) -> list[Document]:
        """Return the choices for one token; none if the client learns nothing from it."""
        logprobs = self._logprobs([token])
        return [self._delta(index, token.text, logprobs, None)] if token.text or logprobs else []

    def end(self, index: int, reason: str) -> list[Document]:
        """Return the last choices of a sequence in a stream."""
        return [self._delta(index, "", None, reason)]

    def _logprobs(self, tokens: Sequence[Token]) -> Document | None:
        if self._top is None:
            return None
        shown = [token for token in tokens if token.id not in self._stops]
        return self._document_of(shown) if shown else None

    def _text_of(self, token: int) -> str:
        return self._bytes_of(token).decode("utf-8", "replace")

    def _head_of(self, id: str, model: str, version: str) -> Document:
        return {"id": f"{self.prefix}-{id}", "created": int(time.time()), "model": model}

    @abstractmethod
    def _choice(self, index: int, text: str, logprobs: Document | None, reason: str) -> Document: ...

    @abstractmethod
    def _delta(self, index: int, text: str, logprobs: Document | None, reason: str | None) -> Document: ...

    @abstractmethod
    def _document_of(self, tokens: Sequence[Token]) -> Document: ...


class ChatDocuments(AnswerDocuments):
    """Documents of a chat completion."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._streams: dict[int, CallDocuments] = {}

    def begin(self, index: int) -> list[Document]:
        """Return the choice that names the role."""
        if self._calls is not None:
            self._streams[index] = CallDocuments(self._calls)
        return [_chat_delta(index, {"role": "assistant", "content": ""}, None, None)]

    def deltas(self, index: int, token: Token) -> list[Document]:
        """Return the choices for one token; none if the client learns nothing from it."""
        if index not in self._streams:
            return super().deltas(index, token)
        logprobs = self._logprobs([token])
        deltas = self._streams[index].push(token.text) or ([{"content": ""}] if logprobs else [])
        return [_chat_delta(index, own, None if at else logprobs, None) for at, own in enumerate(deltas)]

    def end(self, index: int, reason: str) -> list[Document]:
        """Return the last choices of a sequence in a stream."""
        if index not in self._streams:
            return super().end(index, reason)
        rest = [_chat_delta(index, own, None, None) for own in self._streams[index].flush()]
        return [*rest, *super().end(index, self._streams[index].reason(reason))]

    def _choice(self, index: int, text: str, logprobs: Document | None, reason: str) -> Document:
        message = {"role": "assistant", "content": text, "refusal": None}
        if self._calls is not None:
            calls = CallDocuments(self._calls)
            message |= calls.message(text)
            reason = calls.reason(reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, index: int, text: str, logprobs: Document | None, reason: str | None) -> Document:
        return _chat_delta(index, {"content": text} if reason is None else {}, logprobs, reason)

    def _document_of(self, tokens: Sequence[Token]) -> Document:
        content = [
            {
                **self._entry(token.id, token.logprob),
                "top_logprobs": [self._entry(*other) for other in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Document:
        return {"token": self._text_of(token), "logprob": logprob, "bytes": list(self._bytes_of(token))}


class CompletionDocuments(AnswerDocuments):
    """Documents of a completion."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, text: str, logprobs: Document | None, reason: str | None) -> Document:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, index: int, text: str, logprobs: Document | None, reason: str | None) -> Document:
        if logprobs is not None:
            start = self._offsets.get(index, 0)
            logprobs["text_offset"] = [start + offset for offset in logprobs["text_offset"]]
            self._offsets[index] = start + sum(map(len, logprobs["tokens"]))
        return self._choice(index, text, logprobs, reason)

    def _document_of(self, tokens: Sequence[Token]) -> Document:
        names = [self._text_of(token.id) for token in tokens]
        offsets, end = [], 0
        for name in names:
            offsets.append(end)
            end += len(name)
        tops: list[Mapping[str, float]] = [
            {self._text_of(other): logprob for other, logprob in reversed(token.top)} for token in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }


def _chat_delta(index: int, delta: Document, logprobs: Document | None, reason: str | None) -> Document:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
