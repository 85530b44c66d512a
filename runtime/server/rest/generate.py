"""Handlers of the generate extension: text in, text out, whole or as a stream of events."""

from __future__ import annotations

from functools import partial

from tpeft_deploy.runtime.server.openai.endpoints import completion_requests, served
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.v2.generate import GenerateBody, GenerateDocuments, GenerateRequest, generate_body

__all__ = ["generate", "generate_stream"]


async def generate(context: HttpContext) -> object:
    """Serve `POST /v2/models/{model}/generate`."""
    return await _served(context, stream=False)


async def generate_stream(context: HttpContext) -> object:
    """Serve `POST /v2/models/{model}/generate_stream`."""
    return await _served(context, stream=True)


async def _served(context: HttpContext, *, stream: bool) -> object:
    read = partial(_read, context, stream)
    return await served(context, read, GenerateDocuments, completion_requests)


def _read(context: HttpContext, stream: bool, given: bytes | bytearray) -> GenerateBody:
    request = context.decoded(given, GenerateRequest)
    fields = {**context.parsed(given), **(request.parameters or {})}
    names = {"model": context.path("model"), "version": context.path("version")}
    return generate_body(fields, prompt=request.text_input, stream=stream, stream_options=None, **names)
