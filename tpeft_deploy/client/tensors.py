"""Encodes and decodes arrays for the V2 protocol's binary tensor extension."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from tpeft_deploy.errors import InputError, ServerError
from tpeft_deploy.tucker import Array

__all__ = ["Bytes", "Tensor", "decode", "encode", "from_json", "may_be_bfloat16"]

Bytes = bytes | memoryview

_LENGTH = struct.Struct("<I")

# V2 datatype -> numpy dtype, little-endian as on the wire.  numpy has no bfloat16: uint16 holds its bits.
_DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_DATATYPES = {dtype.str[1:]: name for name, dtype in _DTYPES.items() if name != "BF16"}  # "f4" -> "FP32"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An encoded input.

    Attributes:
        name: name of the input.
        datatype: V2 datatype.
        shape: shape of the array.
        data: bytes; a view of the array where its memory layout allows.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Bytes


def may_be_bfloat16(value: object) -> bool:
    """Whether a value is uint16: only the model's metadata tells integers from the bits of bfloat16."""
    return getattr(value, "dtype", None) == np.uint16


def encode(name: str, value: object, *, bfloat16: bool = False) -> Tensor:
    """Encode an input without converting its elements.

    Args:
        name: name of the input.
        value: array, or a value that numpy converts to one; str or bytes elements for BYTES.
        bfloat16: whether uint16 elements are the bits of bfloat16 (default False).

    Raises:
        InputError: numpy cannot convert the value, or the protocol has no datatype for its dtype.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"send input {name!r}", expected="an array", got=f"a value that NumPy cannot convert ({str(error)[:120]})"
        ) from error
    if array.dtype.kind in "OSU":
        return Tensor(name, "BYTES", array.shape, _encode_strings(name, array))
    if array.dtype.name == "bfloat16":
        datatype = "BF16"
    elif array.dtype.str[1:] in _DATATYPES:
        datatype = "BF16" if bfloat16 and array.dtype == np.uint16 else _DATATYPES[array.dtype.str[1:]]
    else:
        raise InputError(f"send input {name!r}", expected=f"dtype {', '.join(_DATATYPES.values())}", got=array.dtype)
    if array.dtype.str.startswith(">"):
        array = array.astype(array.dtype.newbyteorder("<"))
    return Tensor(name, datatype, array.shape, np.ravel(array).view(np.uint8).data)


def _encode_strings(name: str, array: Array) -> bytes:
    pieces = []
    for element in array.ravel().tolist():
        if isinstance(element, str):
            encoded = element.encode()
        elif isinstance(element, bytes):
            encoded = element
        else:
            raise InputError(f"send input {name!r}", expected="elements of str or bytes", got=type(element).__name__)
        pieces += [_LENGTH.pack(len(encoded)), encoded]
    return b"".join(pieces)


def decode(name: str, datatype: str, shape: tuple[int, ...], data: memoryview) -> Array:
    """Decode an output: a view of the bytes, or a copy where they are misaligned.

    Returns:
        An array; its elements are `bytes` objects for BYTES and uint16 for BF16.

    Raises:
        ServerError: the number of bytes does not fit the shape, or the datatype is unknown.
    """
    if datatype == "BYTES":
        return _decode_strings(name, shape, data)
    dtype = _dtype(name, datatype)
    if len(data) != dtype.itemsize * math.prod(shape):
        raise ServerError(
            f"read output {name!r}",
            expected=f"{dtype.itemsize * math.prod(shape)} bytes for {datatype} of shape {list(shape)}",
            got=f"{len(data)} bytes",
        )
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> Array:
    """Decode an output that the server sent as JSON, flat or nested.

    Raises:
        ServerError: the data do not fit the datatype and shape.
    """
    try:
        if datatype == "BYTES":
            texts = np.array(data, dtype=object).reshape(shape)
            return np.vectorize(str.encode, otypes=[object])(texts) if texts.size else texts
        if datatype == "BF16":
            raise ServerError(f"read output {name!r}", problem="JSON has no bfloat16")
        return np.array(data, dtype=_dtype(name, datatype)).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ServerError(
            f"read output {name!r}", expected=f"{datatype} of shape {list(shape)}", got=f"other data ({error})"
        ) from error


def _dtype(name: str, datatype: str) -> np.dtype[np.generic]:
    if datatype not in _DTYPES:
        raise ServerError(f"read output {name!r}", expected="a datatype of the V2 protocol", got=repr(datatype))
    return _DTYPES[datatype]


def _decode_strings(name: str, shape: tuple[int, ...], data: memoryview) -> Array:
    elements, at = [], 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        elements.append(data[at : at + length].tobytes())
        at += length
    if at != len(data) or len(elements) != math.prod(shape):
        raise ServerError(
            f"read output {name!r}",
            expected=f"{math.prod(shape)} elements of BYTES in {len(data)} bytes",
            got=f"{len(elements)} in {at} bytes",
        )
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)
