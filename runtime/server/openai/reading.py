"""Admit a request of OpenAI's API, and read its body, off the event loop if it is long."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import msgspec
import orjson
from starlette.requests import ClientDisconnect

from tpeft_deploy.runtime.server.openai.image_parts import ATTACHED
from tpeft_deploy.runtime.server.openai.text_bodies import TextBody
from tpeft_deploy.runtime.server.operations.texts import GenerationTarget
from tpeft_deploy.runtime.server.rest.bodies import Body
from tpeft_deploy.runtime.server.rest.context import Headers, HttpContext
from tpeft_deploy.runtime.server.rest.infer import ClientLeft
from tpeft_deploy.runtime.server.v2.offload import PIECE
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["INLINE", "NAME", "SCRATCH", "Opened", "Reading", "admitted", "encode"]

NAME = 200
"""Characters of a model's name in the log."""
INLINE = 2048
"""Bytes of a body that is read on the event loop; tokenizers take a microsecond or two for each."""
SCRATCH = 256
"""Bytes of memory that a tokenizer takes for each byte of a text."""
_IMAGE = re.compile(rb"data:image\\?/[a-z]{3,4};base64,[A-Za-z0-9+/=\\]*")
_ENCODED = 1 << 14  # numbers of an answer that is encoded on the event loop
_RATES = {"requests", "tokens"}  # those that OpenAI's API has headers for

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound=Body)
T = TypeVar("T", bound=TextBody)


async def admitted(context: HttpContext, answer: Callable[[], Awaitable[object]]) -> object:
    """Spend a request of the tenant's quota, then answer; a large request that is refused is charged for.

    Raises:
        Forbidden, QuotaExceeded: before the body is read.
    """
    try:
        context.core.admit(context.principal)
        return await _answered(context, answer)
    finally:  # behind the charge, and before the headers of a stream
        context.extra += _rates(context)


async def _answered(context: HttpContext, answer: Callable[[], Awaitable[object]]) -> object:
    try:
        return await answer()
    except (ClientDisconnect, ClientLeft):
        raise
    except Exception:
        context.charge_refusal()
        raise


class Reading:
    """Reads one request; what takes time runs off the event loop.

    Args:
        context: context of the request, which `admitted` has admitted.

    Attributes:
        apart: whether work runs off the event loop, as it does where the body is long.
    """

    def __init__(self, context: HttpContext) -> None:
        self._context = context
        self.apart = False

    async def body(self, read: Callable[[bytes | bytearray], B]) -> B:
        """Read the body; the model that it names becomes the request's task.

        Args:
            read: decodes it; may run off the event loop.

        Raises:
            TooLarge, ProtocolError, QuotaExceeded, Unavailable: as `HttpContext.body` and `decoded`.
        """
        context = self._context
        if context.declared > PIECE or b"content-length" not in context.headers:
            await asyncio.sleep(context.intake.refused.wait(context.tenant))
        given = await context.body(min(context.limits.json_bytes, context.limits.body_bytes))
        context.bytes_in = len(given)
        self.apart = len(given) > INLINE
        claimed = await self.run(_claimed, given)
        context.memory.take(SCRATCH * (len(given) - claimed) + ATTACHED * claimed if self.apart else 0)
        body = await self.run(read, given)
        named: Any = body
        if claimed:  # what is text after all goes through the tokenizer
            attached = getattr(body, "attached", 0)
            context.memory.take((SCRATCH - ATTACHED) * max(0, claimed - attached))
        context.task = named.model[:NAME]
        return body

    async def run(self, work: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Return the result of work on the body."""
        if self.apart:
            return await self._context.intake.offload.run(self._context.tenant, work, *args, **options)
        return work(*args, **options)


class Opened(NamedTuple, Generic[T]):
    """A request on texts that was read.

    Attributes:
        reading: reads what follows of it.
        body: its body, checked.
        target: the versions that its model stands for.
        text: text of the bundle.
    """

    reading: Reading
    body: T
    target: GenerationTarget
    text: ModelText

    @classmethod
    async def of(cls, context: HttpContext, kind: type[T], doing: str, *, encoder: bool = False) -> Opened[T]:
        """Read a request.

        Args:
            context: context of the request.
            kind: type of the body.
            doing: purpose, for messages.
            encoder: whether the text is that of the encoder, if the bundle has several components.

        Raises:
            TpeftError: as `Reading.body`, `TextBody.check`, `Generations.target` and `Texts.open`.
        """
        reading = Reading(context)
        body = await reading.body(partial(context.decoded, kind=kind))
        body.check()
        generations = context.core.generations
        target = generations.target(context.principal, body.model)
        texts = generations.encoders.texts if encoder else generations.texts
        return Opened(reading, body, target, await texts.open(doing))


async def encode(context: HttpContext, document: Callable[[], object], numbers: int) -> msgspec.Raw:
    """Encode an answer, off the event loop if it is long.

    Args:
        context: context of the request.
        document: returns the answer, which may have NumPy arrays.
        numbers: numbers in it.
    """

    def encoded() -> msgspec.Raw:
        return msgspec.Raw(orjson.dumps(document(), option=orjson.OPT_SERIALIZE_NUMPY))

    return encoded() if numbers <= _ENCODED else await context.intake.offload.run(context.tenant, encoded)


def _claimed(given: bytes | bytearray) -> int:
    """Bytes of a body that look like images: one string of JSON each, which takes little memory to read."""
    return sum(found.end() - found.start() for found in _IMAGE.finditer(given)) if b"base64," in given else 0


def _rates(context: HttpContext) -> Headers:
    """Return the headers that tell what is left of the tenant's requests and tokens."""
    headers: Headers = []
    for name, rate in context.core.generations.rates(context.principal).items():
        if name in _RATES:
            found: dict[str, Any] = {"limit": rate.limit, "remaining": rate.remaining, "reset": f"{rate.reset:.3f}s"}
            headers += [(f"x-ratelimit-{key}-{name}".encode(), str(value).encode()) for key, value in found.items()]
    return headers
