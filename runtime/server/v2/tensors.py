"""The elements of V2 tensors as raw bytes, and what is checked before memory is taken for them.

Raw tensors are little-endian and row-major; each element of BYTES has its length before it, in four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.tucker import Array

__all__ = [
    "Bounds",
    "DTYPES",
    "check_shape",
    "check_size",
    "checked",
    "encode_raw",
    "from_raw",
    "objects",
    "quoted",
    "raw_view",
    "texts",
]

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_SHOWN = 80


@dataclass(frozen=True)
class Bounds:
    """What one tensor may have.

    Attributes:
        elements: of a tensor.
        strings: elements of a BYTES tensor, each of which becomes an object.
        dimensions: of a tensor.
    """

    elements: int = 1 << 26
    strings: int = 1 << 20
    dimensions: int = 32


def quoted(name: str) -> str:
    """A client's own word for use in a text: on one line, and not longer than a line."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def check_shape(doing: str, shape: Sequence[int], datatype: str, bounds: Bounds) -> int:
    """The number of elements of a shape.

    Raises:
        ProtocolError: an unknown datatype, or a negative size.
        TooLarge: more dimensions or elements than allowed.
    """
    if datatype != "BYTES" and datatype not in DTYPES:
        raise ProtocolError(f"{doing}: datatype", expected=", ".join([*DTYPES, "BYTES"]), got=quoted(datatype))
    limit = bounds.strings if datatype == "BYTES" else bounds.elements
    if len(shape) > bounds.dimensions:
        raise TooLarge(f"{doing}: shape", expected=f"at most {bounds.dimensions} dimensions", got=len(shape))
    if any(size < 0 for size in shape):
        raise ProtocolError(f"{doing}: shape", expected="sizes of 0 or more", got=list(shape))
    count = math.prod(shape)
    # numpy refuses an empty shape whose other sizes overflow
    if max(count, math.prod(size for size in shape if size)) > limit:
        raise TooLarge(f"{doing}: shape", expected=f"at most {limit} elements", got=list(shape))
    return count


def from_raw(doing: str, datatype: str, raw: bytes | memoryview, count: int) -> Array:
    """A flat array of raw elements; a view of them where the datatype has a fixed size.

    Raises:
        ProtocolError: bytes of another size, or that are no such elements.
    """
    if datatype == "BYTES":
        return objects(_split(doing, bytes(raw), count))
    check_size(doing, datatype, count, len(raw))
    if datatype == "BOOL" and len(raw) and np.frombuffer(raw, np.uint8).max() > 1:
        raise ProtocolError(f"{doing}: raw contents", expected="0 or 1 for each element of BOOL", got="something else")
    return np.frombuffer(raw, DTYPES[datatype])


def check_size(doing: str, datatype: str, count: int, size: int) -> None:
    """Refuse a number of raw bytes that so many elements do not have; those of BYTES say their own sizes.

    Raises:
        ProtocolError: another number.
    """
    if datatype != "BYTES" and size != count * DTYPES[datatype].itemsize:
        raise ProtocolError(f"{doing}: raw contents", expected=f"{count * DTYPES[datatype].itemsize} bytes", got=size)


def objects(elements: Iterable[bytes]) -> Array:
    """A flat array of `bytes` objects."""
    found = list(elements)
    flat = np.empty(len(found), object)
    flat[:] = found
    return flat


def encode_raw(array: Array, datatype: str) -> bytes:
    """An output's elements as raw bytes.

    Raises:
        TypeError: the array is not of that datatype, which is a fault of the server.
    """
    if datatype == "BYTES":
        return b"".join(len(one).to_bytes(4, "little") + one for one in texts(array))
    return checked(array, datatype).tobytes()


def raw_view(array: Array, datatype: str) -> Any:
    """The same as `encode_raw`, as a view of the array where it can be one.

    Raises:
        TypeError: the array is not of that datatype, which is a fault of the server.
    """
    if datatype == "BYTES" or not array.size:
        return encode_raw(array, datatype)
    return np.ascontiguousarray(checked(array, datatype)).reshape(-1).view(np.uint8).data


def texts(array: Array) -> list[bytes]:
    """The elements of BYTES."""
    return [one.encode() if isinstance(one, str) else bytes(one) for one in array.ravel().tolist()]


def checked(array: Array, datatype: str) -> Array:
    """The array as little-endian, if it is of the datatype.

    Raises:
        TypeError: it is not, which is a fault of the server.
    """
    if array.dtype == DTYPES[datatype]:
        return array
    if array.dtype.newbyteorder("<") != DTYPES[datatype]:
        raise TypeError(f"an output of datatype {datatype} has dtype {array.dtype}")
    return array.astype(DTYPES[datatype], copy=False)


def _split(doing: str, raw: bytes, count: int) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    if 4 * count <= len(raw):
        while len(elements) < count and at + 4 <= len(raw):
            start = at + 4
            at = start + int.from_bytes(raw[at:start], "little")
            elements.append(raw[start:at])
    if len(elements) != count or at != len(raw):
        expected = f"{count} elements of BYTES, each after its length, and nothing else"
        raise ProtocolError(f"{doing}: raw contents", expected=expected, got=f"{len(raw)} other bytes")
    return elements
