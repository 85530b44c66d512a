"""Chat completions and completions: read the body, make requests of it, and answer whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
import orjson

from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.sampling import Sampling, Token
from tpeft_deploy.runtime.server.openai.answers import AnswerDocuments, ChatDocuments, CompletionDocuments
from tpeft_deploy.runtime.server.openai.bodies import CompletionBody, GenerationBody
from tpeft_deploy.runtime.server.openai.chat_body import ChatBody
from tpeft_deploy.runtime.server.openai.reading import Reading, admitted
from tpeft_deploy.runtime.server.openai.sse import EventStream, event
from tpeft_deploy.runtime.server.operations.generation import Generations, GenerationTarget, memory_of
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.rest.infer import Watch
from tpeft_deploy.runtime.server.v2.messages import Document
from tpeft_deploy.runtime.text.images import ImageFile
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["chat", "completion_requests", "completions", "served"]

B = TypeVar("B", bound=GenerationBody)

_INLINE_TOKENS = 256  # tokens of an answer that is encoded on the event loop
_ECHOED = 8  # bytes of a character of a prompt in an answer, and of its encoding
_INLINE_ECHO = 1 << 16  # characters of prompts in it
_COMPLETION_TOKENS = 16  # default of max_tokens, as in OpenAI's API


class _Work(NamedTuple):
    """A request that is ready to run."""

    body: GenerationBody
    target: GenerationTarget
    requests: list[GenerationRequest]
    answer: AnswerDocuments

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


Prepare = Callable[[ModelText, Generations, B, Sequence[ImageFile]], list[GenerationRequest]]


async def chat(context: HttpContext) -> object:
    """Serve `POST /v1/chat/completions`."""
    return await served(context, partial(context.decoded, kind=ChatBody), ChatDocuments, _of_chat)


async def completions(context: HttpContext) -> object:
    """Serve `POST /v1/completions`."""
    read = partial(context.decoded, kind=CompletionBody)
    return await served(context, read, CompletionDocuments, completion_requests)


async def served(
    context: HttpContext, read: Callable[[bytes | bytearray], B], answer: type[AnswerDocuments], prepare: Prepare[B]
) -> object:
    """Serve a request that generates text.

    Args:
        context: the request.
        read: decodes its body; may run off the event loop.
        answer: documents of the answer.
        prepare: makes requests of the decoded body; may run off the event loop.
    """

    async def answered() -> object:
        work = await _work(context, read, answer, prepare)
        begun = EventStream.begun(_events(context, work)) if work.body.stream else _whole(context, work)
        return await Watch().cancel_on_disconnect(begun, context.receive)

    return await admitted(context, answered)


async def _work(
    context: HttpContext, read: Callable[[bytes | bytearray], B], answer: type[AnswerDocuments], prepare: Prepare[B]
) -> _Work:
    reading = Reading(context)
    body = await reading.body(read)
    body.check()
    generations = context.core.generations
    target = generations.target(context.principal, *body.address)
    text = await generations.text()
    reading.apart |= body.constrained  # grammars take time to compile
    files = await reading.run(lambda: body.images)
    requests = await reading.run(prepare, text, generations, body, files)
    if files:  # behind what refuses the request, as it is cheaper
        requests = await _with_images(context, generations, requests, files)
    before = await reading.run(body.echoed, partial(text.decode, special=True))
    calls = await reading.run(body.calls, text)
    stops = frozenset(requests[0].sampling.stop_tokens)
    made = answer(context.request_id, body.model, text.token_bytes, stops, body.top, target.version, before, calls)
    context.memory.resize(context.bytes_in + memory_of(requests, body.top or 0) + _ECHOED * made.echoed)
    return _Work(body, target, requests, made)


async def _with_images(
    context: HttpContext, generations: Generations, requests: Sequence[GenerationRequest], files: Sequence[ImageFile]
) -> list[GenerationRequest]:
    """Decode images off the event loop, when the memory for it is reserved."""
    run, images = context.intake.offload.run, generations.images
    context.memory.take(await run(context.tenant, images.memory, files))
    inputs = await run(context.tenant, images.inputs, files)
    return [replace(request, inputs=inputs) for request in requests]


def _sampling(text: ModelText, body: GenerationBody) -> Sampling:
    changes = body.changes()
    if body.stops:  # beside those of the model
        own: Any = text.facts.sampling.get("stop_strings", [])
        changes["stop_strings"] = [*own, *body.stops]
    return text.sampling(**changes)


def _of_chat(
    text: ModelText, generations: Generations, body: ChatBody, files: Sequence[ImageFile]
) -> list[GenerationRequest]:
    sampling = _sampling(text, body)
    tokens = text.chat(body.conversation(), literal=not body.parse_special, **body.options())
    tokens = generations.with_features(tokens, files)
    most = generations.room(tokens, body.most, text.facts.max_new_tokens)
    # An answer begins a text, and what is continued is no part of it.
    before = tokens if body.continue_final_message else []
    constraint = generations.constraint(text, body.schema)
    shown: tuple[str, ...] = ()
    if (use := body.tool_use()) is not None:
        constraint = generations.constraint(text, use.schema(text.tool_format), "tool_choice") or constraint
        shown = use.shown(text.tool_format)
    more: dict[str, Any] = {"scored": body.top is not None, "constraint": constraint}
    return [GenerationRequest(tokens, most, sampling, text=text.detokeniser(before, shown=shown), **more)]


def completion_requests(
    text: ModelText, generations: Generations, body: CompletionBody, files: Sequence[ImageFile] = ()
) -> list[GenerationRequest]:
    """Return the request for each prompt of a body, which has no images."""
    sampling = _sampling(text, body)
    more: dict[str, Any] = {"scored": body.top is not None, "constraint": generations.constraint(text, body.schema)}
    requests = []
    for prompt in body.prompts:
        tokens = (
            text.encode(prompt, special=body.add_special_tokens, literal=not body.parse_special)
            if isinstance(prompt, str)
            else prompt
        )
        most = generations.room(tokens, body.max_tokens, _COMPLETION_TOKENS)
        requests.append(GenerationRequest(tokens, most, sampling, text=text.detokeniser(tokens), **more))
    return requests


async def _whole(context: HttpContext, work: _Work) -> msgspec.Raw:
    async with context.core.generations.started(
        context.principal, work.target, work.requests, context.traceparent
    ) as handles:
        results = [await asyncio.wrap_future(handle.future) for handle in handles]
    usage = _usage(work, handles)

    def encoded() -> msgspec.Raw:
        return msgspec.Raw(orjson.dumps(work.answer.whole(results, usage)))

    few = usage["completion_tokens"] * (1 + (work.body.top or 0)) <= _INLINE_TOKENS
    if few and work.answer.echoed <= _INLINE_ECHO:
        return encoded()
    return await context.intake.offload.run(context.tenant, encoded)


async def _events(context: HttpContext, work: _Work) -> AsyncGenerator[bytes]:
    answer, with_usage = work.answer, work.body.with_usage

    def chunks(choices: Sequence[Document]) -> bytes:
        return b"".join(event(answer.chunk([choice], None, with_usage=with_usage)) for choice in choices)

    async with context.core.generations.started(
        context.principal, work.target, work.requests, context.traceparent
    ) as handles:
        for index in range(len(handles)):
            yield chunks(answer.begin(index))
        async with aclosing(_merged(handles)) as tokens:
            async for index, token in tokens:
                if token is not None:
                    yield chunks(answer.deltas(index, token))
                else:
                    yield chunks(answer.end(index, handles[index].result().reason))
        if with_usage:
            yield event(answer.chunk([], _usage(work, handles), with_usage=True))
        yield answer.done


async def _merged(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, Token | None]]:
    """Yield the tokens of several sequences as they come, each with its index, and None at the end of one."""
    if len(handles) == 1:  # without a task for each token
        async with aclosing(aiter(handles[0])) as tokens:
            async for own in tokens:
                yield 0, own
        yield 0, None
        return
    streams = [aiter(handle) for handle in handles]
    pending = {asyncio.create_task(_next(stream)): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, token = pending.pop(task), task.result()
                if token is not None:
                    pending[asyncio.create_task(_next(streams[index]))] = index
                yield index, token
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[Token]) -> Token | None:
    return await anext(stream, None)


def _usage(work: _Work, handles: Sequence[Handle]) -> Document:
    given, made = work.prompt_tokens, sum(len(handle.tokens) for handle in handles)
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
