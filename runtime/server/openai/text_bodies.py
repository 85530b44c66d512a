"""Bodies of requests on texts that generate nothing: embeddings, classification, tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.server.openai.bodies import Count, TokenId, refuse_unsupported, texts_or_tokens
from tpeft_deploy.runtime.server.openai.chat_body import ChatBody
from tpeft_deploy.runtime.server.rest.bodies import Body

__all__ = ["ClassifyBody", "DetokenizeBody", "EmbeddingBody", "TextBody", "TextPair", "TokenizeBody"]

_MOST_TEXTS = 2048  # as in OpenAI's API


class TextBody(Body, forbid_unknown_fields=False, kw_only=True):
    """What requests on texts share."""

    model: str

    def check(self) -> None:
        """Refuse fields that the server does not support.

        Raises:
            InputError: a field asks for something else than the server does.
        """
        refuse_unsupported(self, {})


class _EncodedBody(TextBody, kw_only=True):
    """Fields of requests to encoders."""

    parse_special: bool = False
    add_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None

    def check(self) -> None:
        """Refuse fields that the server does not support; raises as `TextBody.check` does."""
        super().check()
        if self.truncate_prompt_tokens == 0:
            raise InputError("read field 'truncate_prompt_tokens'", expected="a number from 1, or -1", got=0)


class EmbeddingBody(_EncodedBody, kw_only=True):
    """Body of `POST /v1/embeddings`."""

    input: str | list[TokenId | str | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    embed_dtype: Any = None
    messages: Any = None
    normalize: Any = None
    use_activation: Any = None

    unlisted: ClassVar[tuple[str, ...]] = ("embed_dtype", "messages", "normalize", "use_activation")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, each a text or tokens.

        Raises:
            InputError: there are none, or too many, or they are of different types.
        """
        return _few(texts_or_tokens("input", self.input))


class TextPair(msgspec.Struct, forbid_unknown_fields=True):
    """A text, and the one that it is classified with."""

    text: str
    text_pair: str | None = None


class ClassifyBody(_EncodedBody, kw_only=True):
    """Body of `POST /v1/classify`."""

    input: str | TextPair | list[str | TextPair | Annotated[list[str], msgspec.Meta(min_length=2, max_length=2)]]
    activation: Any = None
    softmax: Any = None
    use_activation: Any = None

    unlisted: ClassVar[tuple[str, ...]] = ("activation", "softmax", "use_activation")

    @property
    def inputs(self) -> list[TextPair]:
        """The inputs.

        Raises:
            InputError: there are none, or too many.
        """
        several = self.input if isinstance(self.input, list) else [self.input]
        if not several:
            raise InputError("read field 'input'", expected="a text, texts or pairs of texts", got="none")
        return [
            TextPair(own) if isinstance(own, str) else TextPair(*own) if isinstance(own, list) else own
            for own in _few(several)
        ]


class TokenizeBody(TextBody, kw_only=True):
    """Body of `POST /v1/tokenize`: a prompt, or the messages of a chat."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool = False
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: Any = None

    unlisted: ClassVar[tuple[str, ...]] = ("chat_template",)

    def check(self) -> None:
        """Refuse a body without a text, with two, or with a field that the server does not support.

        Raises:
            InputError: as said.
        """
        super().check()
        if (self.prompt is None) == (self.messages is None):
            raise InputError(
                "read field 'prompt'", expected="prompt or messages", got="neither" if self.prompt is None else "both"
            )
        if self.messages is not None and self.add_special_tokens:
            raise InputError("read field 'add_special_tokens'", problem="the chat template gives the special tokens")

    def chat(self) -> ChatBody:
        """Return the body of a chat with the messages."""
        names = ("model", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        return ChatBody(messages=self.messages or [], **{name: getattr(self, name) for name in names})


class DetokenizeBody(TextBody, kw_only=True):
    """Body of `POST /v1/detokenize`."""

    tokens: list[TokenId]


def _few(several: list[Any]) -> list[Any]:
    if len(several) > _MOST_TEXTS:
        raise InputError("read field 'input'", expected=f"at most {_MOST_TEXTS:,} texts", got=f"{len(several):,}")
    return several
