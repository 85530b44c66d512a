# Written by .ci/unasync.py from asynchronous/text.py; change that file, then run `make client`.
"""The blocking client: generated text and embeddings."""

from __future__ import annotations

from typing import Literal, overload

from tpeft_deploy.client import text
from tpeft_deploy.client.blocking.connection import ServerConnection
from tpeft_deploy.client.blocking.stream import TextStream
from tpeft_deploy.client.exchange import ServerCall
from tpeft_deploy.client.text import Completion, Messages, Prompt
from tpeft_deploy.tucker import Array

__all__ = ["TextCalls"]


class TextCalls(ServerConnection):
    """Generated text and embeddings, for bundles with text."""

    @overload
    def chat(
        self,
        messages: Messages,
        task: str = "base",
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: object,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Messages,
        task: str = "base",
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: object,
    ) -> TextStream: ...

    def chat(
        self,
        messages: Messages,
        task: str = "base",
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: object,
    ) -> Completion | TextStream:
        """Answer a conversation.

        Args:
            messages: messages with `role` and `content`, or a text, which is one message of the user.
            task: task, `name` or `name@version`, or weighted set, `a:0.7+b:0.3` (default "base").
            stream: whether to return the text in pieces while it is generated (default False).
            timeout: seconds for the call, a stream's end included (default the client's).
            options: further fields of the request in OpenAI's API: `max_tokens`, `temperature`, `stop`, ...

        Returns:
            The text and what is known about it; with `stream`, an iterator over its pieces.

        Raises:
            InputError: the server cannot do what the fields ask for, the prompt is too long, or the bundle has no text.
            NotFound: the task does not exist, or the key may not see it.
            QuotaExceeded, QueueFull, Unavailable: the server has no capacity, after all retries.
            DeadlineExceeded: no answer within the timeout.
        """
        return self._generated(text.chat(messages, task, options, stream=stream), stream, timeout)

    @overload
    def generate(
        self,
        prompt: Prompt,
        task: str = "base",
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: object,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        task: str = "base",
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: object,
    ) -> TextStream: ...

    def generate(
        self,
        prompt: Prompt,
        task: str = "base",
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: object,
    ) -> Completion | TextStream:
        """Continue prompts; the server generates 16 tokens for each if `max_tokens` is not given.

        Args:
            prompt: a text, the tokens of one, or a list of either; a stream takes one.
            task: task or weighted set, as for `chat` (default "base").
            stream: whether to return the text in pieces while it is generated (default False).
            timeout: seconds for the call, a stream's end included (default the client's).
            options: further fields of the request in OpenAI's API, as for `chat`.

        Returns:
            The texts and what is known about them; with `stream`, an iterator over the pieces of one.

        Raises:
            TpeftError: as `chat`.
        """
        return self._generated(text.generate(prompt, task, options, stream=stream), stream, timeout)

    def embed(self, texts: Prompt, task: str = "base", *, timeout: float | None = None, **options: object) -> Array:
        """Return embeddings of texts, with the pooling that the bundle declares.

        Args:
            texts: a text, the tokens of one, or a list of either.
            task: task, `name` or `name@version` (default "base").
            timeout: seconds for the call (default the client's).
            options: further fields of the request in OpenAI's API, such as `dimensions`.

        Returns:
            float32 array with one row per text.

        Raises:
            TpeftError: as `chat`.
        """
        return self._do(text.embed(texts, task, options), self._budget(timeout))

    def _generated(self, call: ServerCall[Completion], stream: bool, timeout: float | None) -> Completion | TextStream:
        budget = self._budget(timeout)
        if stream:
            return self._stream(call, budget)
        whole: Completion = self._do(call, budget)
        return whole
