"""Parts of messages in OpenAI's API: texts, and images as `data:` URLs, which are read and never fetched."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime.text.images import ImageFile

__all__ = ["ATTACHED", "MOST_IMAGES", "attached_bytes", "content_of", "image_count", "image_files"]

MOST_IMAGES = 16
"""Images of a request at most."""
ATTACHED = 4
"""Bytes of memory for each byte of an image in a body: its text, the bytes that it stands for, and copies."""

_MEDIA = ("image/png", "image/jpeg", "image/jpg", "image/webp")


def content_of(content: Any, at: int) -> Any:
    """Content of a message for a chat template: one text, or a list of parts if there are images among them.

    Args:
        content: content of the message in the body.
        at: index of the message.

    Raises:
        InputError: a part is neither a text nor an image.
    """
    if not isinstance(content, list):
        return content
    parts = [_part(part, _doing(at, index)) for index, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def image_files(messages: Sequence[Mapping[str, Any]]) -> list[ImageFile]:
    """Return the files of the images of messages, in their order.

    Args:
        messages: messages of a body.

    Raises:
        InputError: there are too many, or one is no `data:` URL of a supported type in base64.
    """
    found = _urls(messages)
    if len(found) > MOST_IMAGES:
        raise InputError("read field 'messages'", expected=f"at most {MOST_IMAGES} images", got=len(found))
    return [ImageFile(_file(url, doing), doing) for doing, url in found]


def image_count(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of images of messages."""
    return len(_urls(messages))


def attached_bytes(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the length of the URLs of all images of messages."""
    return sum(len(url) for _, url in _urls(messages) if isinstance(url, str))


def _urls(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """URL of each image, behind what reads it, for messages."""
    found = []
    for at, message in enumerate(messages):
        content = message.get("content")
        for index, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, dict) and part.get("type") == "image_url":
                given = part.get("image_url")
                url = given.get("url") if isinstance(given, dict) else given
                found.append((_doing(at, index), url))
    return found


def _doing(message: int, part: int) -> str:
    return f"read field 'messages[{message}].content[{part}]'"


def _part(part: Any, doing: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url":
        return {"type": "image"}
    text = part.get("text") if kind == "text" else part.get("refusal") if kind == "refusal" else None
    if not isinstance(text, str):
        raise InputError(doing, expected="type 'text' or 'image_url'", got=f"{str(kind)[:40]!r}")
    return {"type": "text", "text": text}


def _file(url: Any, doing: str) -> bytes:
    if not isinstance(url, str):
        raise InputError(doing, expected="image_url.url to be a text", got=type(url).__name__)
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.lower() != "data":
        raise InputError(
            doing, expected="a data: URL", got=repr(url[:40]), fix="URLs are never fetched; send a data: URL."
        )
    head, comma, data = rest.partition(",")
    media, _, coding = head.rpartition(";")
    if not comma or coding.strip().lower() != "base64":
        raise InputError(doing, expected="a data: URL in base64 (data:image/png;base64,...)", got=repr(url[:40]))
    if media.partition(";")[0].strip().lower() not in _MEDIA:
        raise InputError(doing, expected=f"one of the types {', '.join(_MEDIA)}", got=repr(media[:40]))
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(doing, expected="an image in base64", got=f"what is not ({error})") from error
