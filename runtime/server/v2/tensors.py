"""Raw codec of V2 tensors, with checks before memory is allocated.

Raw tensors are little-endian and row-major; each element of BYTES is prefixed by its length in four bytes.
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
    """Limits of one tensor.

    Attributes:
        elements: maximum number of elements.
        strings: maximum number of elements of a BYTES tensor, each of which becomes an object.
        dimensions: maximum number of dimensions.
    """

    elements: int = 1 << 26
    strings: int = 1 << 20
    dimensions: int = 32


def quoted(name: str) -> str:
    """Quote a client string for a message: on one line, truncated to the length of a line."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def check_shape(doing: str, shape: Sequence[int], datatype: str, bounds: Bounds) -> int:
    """Validate a shape, and return its number of elements.

    Raises:
        ProtocolError: unknown datatype, or negative size.
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
    # NumPy rejects empty shapes if the product of the other sizes overflows.
    if max(count, math.prod(size for size in shape if size)) > limit:
        raise TooLarge(f"{doing}: shape", expected=f"at most {limit} elements", got=list(shape))
    return count


def from_raw(doing: str, datatype: str, raw: bytes | memoryview, count: int) -> Array:
    """Decode raw elements to a flat array; a view if the datatype has a fixed size.

    Raises:
        ProtocolError: the number of bytes is wrong, or the elements are invalid.
    """
    if datatype == "BYTES":
        return objects(_split(doing, bytes(raw), count))
    check_size(doing, datatype, count, len(raw))
    if datatype == "BOOL" and len(raw) and np.frombuffer(raw, np.uint8).max() > 1:
        raise ProtocolError(f"{doing}: raw contents", expected="0 or 1 for each element of BOOL", got="something else")
    return np.frombuffer(raw, DTYPES[datatype])


def check_size(doing: str, datatype: str, count: int, size: int) -> None:
    """Check the number of raw bytes of `count` elements; skipped for BYTES, as elements differ in size.

    Raises:
        ProtocolError: the number is wrong.
    """
    if datatype != "BYTES" and size != count * DTYPES[datatype].itemsize:
        raise ProtocolError(f"{doing}: raw contents", expected=f"{count * DTYPES[datatype].itemsize} bytes", got=size)


def objects(elements: Iterable[bytes]) -> Array:
    """Return a flat array of `bytes` objects."""
    found = list(elements)
    flat = np.empty(len(found), object)
    flat[:] = found
    return flat


def encode_raw(array: Array, datatype: str) -> bytes:
    """Encode an output as raw bytes.

    Raises:
        TypeError: the array does not have that datatype, which is a server error.
    """
    if datatype == "BYTES":
        return b"".join(len(one).to_bytes(4, "little") + one for one in texts(array))
    return checked(array, datatype).tobytes()


def raw_view(array: Array, datatype: str) -> Any:
    """Encode like `encode_raw`, as a view of the array if possible.

    Raises:
        TypeError: the array does not have that datatype, which is a server error.
    """
    if datatype == "BYTES" or not array.size:
        return encode_raw(array, datatype)
    return np.ascontiguousarray(checked(array, datatype)).reshape(-1).view(np.uint8).data


def texts(array: Array) -> list[bytes]:
    """Return the elements of a BYTES array."""
    return [one.encode() if isinstance(one, str) else bytes(one) for one in array.ravel().tolist()]


def checked(array: Array, datatype: str) -> Array:
    """Return the array as little-endian after checking its datatype.

    Raises:
        TypeError: the array does not have that datatype, which is a server error.
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
