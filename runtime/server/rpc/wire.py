"""Reading messages: how many fields there are is counted before the message is parsed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.rpc.limits import Limits

__all__ = ["parse"]

_TENSORS = frozenset({5, 6})  # inputs and outputs of ModelInferRequest
_LENGTHS = {1: 8, 5: 4}  # wire types of fixed size


M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes, limits: Limits) -> M:
    """A message from its bytes.

    Raises:
        TooLarge: it has more fields than `limits.fields`.
        ProtocolError: it is not a message of that kind.
    """
    if len(data) > 2 * limits.fields:  # a field takes two bytes at least
        _count(memoryview(data), limits.fields)
    try:
        message: M = kind.FromString(data)
    except DecodeError:  # whose text says nothing more
        raise _malformed("a field that does not fit") from None
    return message


def _count(data: memoryview, limit: int) -> None:
    left = limit
    for number, inner in _fields(data):
        left -= 1
        if number in _TENSORS:
            # Strings of these numbers in other messages need not be messages themselves.
            left -= _count_inner(inner, left)
        if left < 0:
            raise TooLarge("message", expected=f"at most {limit} fields", got="more")


def _count_inner(data: memoryview, limit: int) -> int:
    count = 0
    try:
        for _ in _fields(data):
            count += 1
            if count > limit:
                break
    except ProtocolError:
        return count  # the parser says what is wrong
    return count


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(data, at)
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
            yield tag >> 3, data[:0]
        elif kind in _LENGTHS:
            at += _LENGTHS[kind]
            yield tag >> 3, data[:0]
        else:
            raise _malformed("groups, which the protocol has none of")
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


def _malformed(got: str) -> ProtocolError:
    return ProtocolError("message", expected="a protobuf message of this rpc", got=got)
