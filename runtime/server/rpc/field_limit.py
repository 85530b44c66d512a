"""Message codec that counts fields and elements before parsing, and does not copy raw tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.v2.limits import RpcLimits

__all__ = ["join_raw", "parse", "split_raw"]

_TEXTS = frozenset({1, 2, 3})  # field numbers of the names and the id in ModelInferRequest
_TEXT_BYTES = 1 << 16
_TENSORS = frozenset({5, 6})  # field numbers of inputs and outputs in ModelInferRequest
_CONTENTS = 5  # field number of contents in an input
_RAW = 7  # field number of raw_input_contents in ModelInferRequest
_BYTES = 8  # field number of bytes_contents
_WIDTHS = {6: 4, 7: 8}  # bytes per element of fp32_contents and fp64_contents
_STRING = 16  # elements that one bytes element counts as
_LENGTH = 2  # wire type of length-delimited fields
_LENGTHS = {1: 8, 5: 4}  # bytes of the fixed-size wire types


M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes, limits: RpcLimits) -> M:
    """Parse a message.

    Raises:
        TooLarge: more fields than `limits.fields`, or more typed elements than `limits.typed_elements`.
        ProtocolError: `data` is not a message of type `kind`.
    """
    if len(data) > 2 * limits.fields:  # a field takes at least two bytes
        _count(memoryview(data), limits)
    try:
        message: M = kind.FromString(data)
    except DecodeError:  # its text has no details
        raise _malformed("a field that does not fit") from None
    return message


def split_raw(data: bytes, limits: RpcLimits) -> tuple[bytes, list[memoryview]]:
    """Split a ModelInferRequest into the message without raw tensors, and the raw tensors as views of `data`.

    Raises:
        TooLarge: more fields than `limits.fields`.
        ProtocolError: `data` is not a message.
    """
    view = memoryview(data)
    rest: list[memoryview] = []
    raws: list[memoryview] = []
    start = 0
    for count, (number, kind, at, inner) in enumerate(_placed(view)):
        if count >= limits.fields:
            raise _too_many(limits)
        if number == _RAW and kind == _LENGTH:
            raws.append(inner)
        elif number in _TEXTS and len(inner) > _TEXT_BYTES:
            raise TooLarge(
                "message", expected=f"names and an id of at most {_TEXT_BYTES:,} bytes", got=f"{len(inner):,}"
            )
        else:
            rest.append(view[start:at])
        start = at
    return b"".join(rest) if raws else data, raws


def join_raw(head: bytes, number: int, raws: Sequence[Any], within: int | None = None) -> bytes:
    """Serialise a message with raw tensors, copying each tensor once.

    Args:
        head: serialised other fields.
        number: field number of the raw tensors.
        raws: raw tensors, as bytes or views.
        within: field number in an enclosing message that has no other field; None for no enclosing message.
    """
    parts: list[Any] = [head]
    for raw in raws:
        parts += (_length_prefix(number, len(raw)), raw)
    if within is not None:
        parts.insert(0, _length_prefix(within, sum(map(len, parts))))
    return b"".join(parts)


def _length_prefix(number: int, size: int) -> bytes:
    found = bytearray([number << 3 | _LENGTH])
    while size > 127:
        found.append(size & 127 | 128)
        size >>= 7
    found.append(size)
    return bytes(found)


def _count(data: memoryview, limits: RpcLimits) -> None:
    left, elements = limits.fields, limits.typed_elements
    for number, inner in _fields(data):
        left -= 1
        if number in _TENSORS:
            # In other messages these field numbers may be strings, which need not parse as messages.
            fields, typed = _count_inner(inner, left, elements)
            left -= fields
            elements -= typed
        if left < 0:
            raise _too_many(limits)
        if elements < 0:
            raise TooLarge(
                "message",
                expected=f"at most {limits.typed_elements:,} elements in typed contents",
                got="more",
                fix="Send raw_input_contents.",
            )


def _count_inner(data: memoryview, limit: int, elements: int) -> tuple[int, int]:
    count = typed = 0
    try:
        for number, inner in _fields(data):
            count += 1
            if number == _CONTENTS and len(inner):
                typed += _count_elements(inner, elements)
            if count > limit or typed > elements:
                break
    except ProtocolError:
        pass  # the parser reports the error
    return count, typed


def _count_elements(data: memoryview, limit: int) -> int:
    count = 0
    for number, inner in _fields(data):
        if number == _BYTES or not len(inner):
            count += _STRING  # bytes, or a single element
        elif number in _WIDTHS:
            count += len(inner) // _WIDTHS[number]
        else:
            # The last byte of a varint has a clear high bit.
            count += int(np.count_nonzero(np.frombuffer(inner, np.uint8) < 128))
        if count > limit:
            break
    return count


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    return ((number, inner) for number, _, _, inner in _placed(data))


def _placed(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield number, wire type, end offset, and length-delimited bytes of each field."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        inner = data[:0]
        if kind == _LENGTH:
            size, at = _varint(data, at)
            inner = data[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in _LENGTHS:
            at += _LENGTHS[kind]
        else:
            raise _malformed("groups, which the protocol has none of")
        yield tag >> 3, kind, at, inner
    if at > len(data):
        raise _malformed("a field that ends after the message")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _malformed("a number that ends after the message")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _malformed("a number of more than ten bytes")


def _too_many(limits: RpcLimits) -> TooLarge:
    return TooLarge("message", expected=f"at most {limits.fields} fields", got="more")


def _malformed(got: str) -> ProtocolError:
    return ProtocolError("message", expected="a protobuf message of this rpc", got=got)
