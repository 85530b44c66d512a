"""Body of a chat completion."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

import msgspec

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.server.openai.bodies import Count, GenerationBody
from tpeft_deploy.runtime.server.openai.image_parts import attached_bytes, content_of, image_count, image_files
from tpeft_deploy.runtime.server.openai.tools import CallReaders, ToolUse, with_objects
from tpeft_deploy.runtime.text.images import ImageFile
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["ChatBody"]

_RESERVED = {"literal", "messages", "self", "template", "variables"}


class ChatBody(GenerationBody, kw_only=True, dict=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    audio: Any = None
    chat_template: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    web_search_options: Any = None

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.harmless,
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
    }
    unlisted: ClassVar[tuple[str, ...]] = (
        *GenerationBody.unlisted,
        *("audio", "chat_template", "function_call", "functions", "modalities", "web_search_options"),
    )

    @property
    def top(self) -> int | None:
        """Number of most probable tokens to give with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """Number of tokens to generate at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Refuse fields that the server does not support; raises as `GenerationBody.check` does."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InputError(
                "read field 'top_logprobs'", expected="logprobs to be true with it", got="logprobs not set"
            )
        if self._forced and self.schema is not None:
            expected = "no response_format of JSON with it, as both bound the answer"
            raise InputError("read field 'tool_choice'", expected=expected, got="both")

    @property
    def constrained(self) -> bool:
        """Whether a grammar bounds the answer."""
        return self._forced or super().constrained

    def tool_use(self) -> ToolUse | None:
        """Return the tools that the answer may call; None for none.

        Raises:
            InputError: as `ToolUse.of`.
        """
        return self._tool_use

    @cached_property
    def _tool_use(self) -> ToolUse | None:
        return ToolUse.of(self.tools or [], self.tool_choice, several=self.parallel_tool_calls is not False)

    def calls(self, text: ModelText) -> CallReaders | None:
        """Return how tool calls of the answer are read; None where the answer is text.

        Args:
            text: text of the bundle.
        """
        use = self.tool_use()
        return None if use is None else use.readers(text.tool_format)

    @property
    def _forced(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    def options(self) -> dict[str, Any]:
        """Return the options of the chat template.

        Raises:
            InputError: a variable has a name that is not the request's to set.
        """
        reserved = _RESERVED & set(self.chat_template_kwargs or {})
        if reserved:
            got = ", ".join(sorted(reserved))
            raise InputError("read field 'chat_template_kwargs'", expected="variables of the template", got=got)
        tools = None if self.tool_choice == "none" else self.tools or None
        prompted = self.add_generation_prompt
        generation = not self.continue_final_message if prompted is None else prompted
        return {
            **(self.chat_template_kwargs or {}),
            "tools": tools,
            "documents": self.documents,
            "add_generation_prompt": generation,
            "continue_final_message": self.continue_final_message,
        }

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages, with text in the place of lists of texts, as most templates read.

        Lists with images stay lists, with `{"type": "image"}` in the place of each image.

        Raises:
            InputError: a part of a message is neither a text nor an image, or a tool call is not one.
        """
        return [
            {**with_objects(own, at), "content": content_of(own.get("content"), at)}
            for at, own in enumerate(self.messages)
        ]

    @property
    def images(self) -> list[ImageFile]:
        """The files of the images of the messages, in their order.

        Raises:
            InputError: there are too many, or one is no `data:` URL of a supported type in base64.
        """
        return image_files(self.messages)

    @property
    def image_count(self) -> int:
        """Number of images of the messages."""
        return image_count(self.messages)

    @property
    def attached(self) -> int:
        """Length of the URLs of all images."""
        return attached_bytes(self.messages)
