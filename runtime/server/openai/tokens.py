"""Tokens of a text and text of tokens, in the form of vLLM's API."""

from __future__ import annotations

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.server.openai.reading import Opened, admitted, encode
from tpeft_deploy.runtime.server.openai.text_bodies import DetokenizeBody, TokenizeBody
from tpeft_deploy.runtime.server.operations.texts import TOKEN
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.v2.messages import Document
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["detokenize", "tokenize"]

_NAME = 64  # bytes of the name of a token


async def tokenize(context: HttpContext) -> object:
    """Serve `POST /v1/tokenize`."""

    async def answered() -> object:
        reading, body, _, text = await Opened.of(context, TokenizeBody, "tokenize text")
        document = await reading.run(_tokens, text, body)
        each = TOKEN + (_NAME if body.return_token_strs else 0)
        context.memory.resize(context.bytes_in + each * len(document["tokens"]))
        document["max_model_len"] = context.core.generations.most_tokens or text.facts.most_tokens
        return await encode(context, lambda: document, document["count"])

    return await admitted(context, answered)


async def detokenize(context: HttpContext) -> object:
    """Serve `POST /v1/detokenize`."""

    async def answered() -> object:
        reading, body, _, text = await Opened.of(context, DetokenizeBody, "detokenize text")
        document = await reading.run(_text, text, body.tokens)
        return await encode(context, lambda: document, len(body.tokens))

    return await admitted(context, answered)


def _tokens(text: ModelText, body: TokenizeBody) -> Document:
    literal = not body.parse_special
    if body.prompt is None:
        chat = body.chat()
        if chat.image_count:
            raise InputError("tokenize text", expected="messages of texts", got=f"{chat.image_count} images")
        tokens = text.chat(chat.conversation(), literal=literal, **chat.options())
    else:
        tokens = text.encode(body.prompt, special=body.add_special_tokens is not False, literal=literal)
    names = [text.name(token) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "tokens": tokens, "token_strs": names}


def _text(text: ModelText, tokens: list[int]) -> Document:
    unknown = next((token for token in set(tokens) if text.name(token) is None), None)
    if unknown is not None:
        raise InputError("read field 'tokens'", expected="tokens of the model", got=unknown)
    return {"prompt": text.decode(tokens, special=True)}
