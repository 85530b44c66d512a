"""Files of an upload as they come: the parts of a form, or one body."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from tpeft_deploy.errors import Conflict, ProtocolError, TooLarge
from tpeft_deploy.runtime.server.core import Part
from tpeft_deploy.runtime.server.elements import quoted
from tpeft_deploy.runtime.server.rest.asked import Asked

__all__ = ["parts"]


async def parts(asked: Asked) -> AsyncIterator[Part]:
    """The files of an upload: parts of a form, or the body itself as the weights."""
    request = asked.request
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        yield "weights", _counted(asked)
        return
    counted = Request(request.scope, _receiving(asked))
    try:
        form = await counted.form(max_files=4, max_fields=4)
    except MultiPartException as error:
        raise ProtocolError("read an upload", problem=error.message) from None
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise ProtocolError(
                    f"read part {quoted(name)}", expected="a file", got="a field", fix="curl -F NAME=@FILE"
                )
            yield name, _pieces(value)
    finally:
        await form.close()


async def _counted(asked: Asked) -> AsyncIterator[bytes]:
    try:
        async for part in asked.request.stream():
            yield part
    except ClientDisconnect:
        raise Conflict("read an upload", problem="the client went away before its end") from None


def _receiving(asked: Asked) -> Callable[[], Awaitable[Any]]:
    """The request's messages, as long as their bodies are within the limit: a form goes to disk as it comes."""
    size = 0
    limit = asked.limits.upload_bytes + asked.limits.document_bytes

    async def receive() -> Any:
        nonlocal size
        message = await asked.request.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise TooLarge("read an upload", expected=f"at most {limit:,} bytes", got="more")
        return message

    return receive


async def _pieces(file: UploadFile) -> AsyncIterator[bytes]:
    while data := await file.read(1 << 20):
        yield data
