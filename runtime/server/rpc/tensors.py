"""Tensors of the V2 protocol over gRPC: raw bytes or typed contents on one side, numpy arrays on the other.

| datatype | numpy | contents |
|---|---|---|
| BOOL | bool | bool_contents |
| UINT8, UINT16, UINT32 | the same | uint_contents |
| UINT64 | uint64 | uint64_contents |
| INT8, INT16, INT32 | the same | int_contents |
| INT64 | int64 | int64_contents |
| FP16 | float16 | raw only |
| BF16 | uint16, its bits | raw only |
| FP32, FP64 | float32, float64 | fp32_contents, fp64_contents |
| BYTES | objects of type bytes | bytes_contents |

Raw tensors are little-endian and row-major; each element of BYTES has its length before it, in four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.limits import Limits
from tpeft_deploy.tucker import Array

__all__ = ["decode", "encode_contents", "encode_raw", "has_contents", "quoted"]

_DTYPES = {
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
_FIELDS = {
    "BOOL": ("bool_contents", np.dtype(np.bool_)),
    "UINT8": ("uint_contents", np.dtype("<u4")),
    "UINT16": ("uint_contents", np.dtype("<u4")),
    "UINT32": ("uint_contents", np.dtype("<u4")),
    "UINT64": ("uint64_contents", np.dtype("<u8")),
    "INT8": ("int_contents", np.dtype("<i4")),
    "INT16": ("int_contents", np.dtype("<i4")),
    "INT32": ("int_contents", np.dtype("<i4")),
    "INT64": ("int64_contents", np.dtype("<i8")),
    "FP32": ("fp32_contents", np.dtype("<f4")),
    "FP64": ("fp64_contents", np.dtype("<f8")),
    "BYTES": ("bytes_contents", np.dtype(object)),
}
_SHOWN = 80


def quoted(name: str) -> str:
    """A client's own word for use in a text: on one line, and not longer than a line."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def has_contents(datatype: str) -> bool:
    """Whether elements of the datatype can be sent as typed contents."""
    return datatype in _FIELDS


def decode(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, limits: Limits) -> Array:
    """An input as an array.

    Args:
        tensor: name, datatype and shape, and the elements unless they are raw.
        raw: the elements, or None when the tensor has them.
        limits: on shape and size, checked before anything is allocated.

    Returns:
        An array of the tensor's shape; a view of `raw` wherever the datatype has a fixed size.

    Raises:
        ProtocolError: unknown datatype, or elements that do not fit datatype and shape.
        TooLarge: more dimensions or elements than the limits allow.
    """
    doing = f"input {quoted(tensor.name)}"
    datatype = tensor.datatype
    if datatype != "BYTES" and datatype not in _DTYPES:
        raise ProtocolError(f"{doing}: datatype", expected=", ".join([*_DTYPES, "BYTES"]), got=quoted(datatype))
    count = _elements(doing, tensor.shape, limits.strings if datatype == "BYTES" else limits.elements, limits)
    if raw is None:
        flat = _from_contents(doing, tensor, count)
    elif datatype == "BYTES":
        flat = _objects(_split(doing, raw, count))
    else:
        flat = _from_raw(doing, datatype, raw, count)
    return flat.reshape(tuple(tensor.shape))


def _elements(doing: str, shape: Sequence[int], limit: int, limits: Limits) -> int:
    if len(shape) > limits.dimensions:
        raise TooLarge(f"{doing}: shape", expected=f"at most {limits.dimensions} dimensions", got=len(shape))
    if any(size < 0 for size in shape):
        raise ProtocolError(f"{doing}: shape", expected="sizes of 0 or more", got=list(shape))
    count = math.prod(shape)
    # numpy refuses an empty shape whose other sizes overflow
    if max(count, math.prod(size for size in shape if size)) > limit:
        raise TooLarge(f"{doing}: shape", expected=f"at most {limit} elements", got=list(shape))
    return count


def _from_raw(doing: str, datatype: str, raw: bytes, count: int) -> Array:
    dtype = _DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise ProtocolError(f"{doing}: raw contents", expected=f"{count * dtype.itemsize} bytes", got=len(raw))
    if datatype == "BOOL" and raw.translate(None, b"\0\1"):
        raise ProtocolError(f"{doing}: raw contents", expected="0 or 1 for each element of BOOL", got="something else")
    return np.frombuffer(raw, dtype)


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


def _from_contents(doing: str, tensor: pb.ModelInferRequest.InferInputTensor, count: int) -> Array:
    doing = f"{doing}: contents"
    if tensor.datatype not in _FIELDS:
        raise ProtocolError(doing, expected=f"raw_input_contents, as {tensor.datatype} has no other form", got="none")
    field, wide = _FIELDS[tensor.datatype]
    others = [found.name for found, _ in tensor.contents.ListFields() if found.name != field]
    if others:
        raise ProtocolError(doing, expected=f"{field} for {tensor.datatype}", got=", ".join(others))
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise ProtocolError(doing, expected=f"{count} elements in {field}", got=len(values))
    if tensor.datatype == "BYTES":
        return _objects(values)
    flat = np.fromiter(values, wide, count)
    narrow = _DTYPES[tensor.datatype]
    exact = flat.astype(narrow, copy=False)
    if narrow != wide and not np.array_equal(exact, flat):
        raise ProtocolError(doing, expected=f"elements within {tensor.datatype}", got=f"{flat.min()} to {flat.max()}")
    return exact


def _objects(elements: Iterable[bytes]) -> Array:
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
        return b"".join(len(one).to_bytes(4, "little") + one for one in _texts(array))
    return _checked(array, datatype).tobytes()


def encode_contents(array: Array, datatype: str) -> pb.InferTensorContents:
    """An output's elements as typed contents; only of a datatype that `has_contents`.

    Raises:
        TypeError: the array is not of that datatype, which is a fault of the server.
    """
    field, _ = _FIELDS[datatype]
    values = _texts(array) if datatype == "BYTES" else _checked(array, datatype).ravel().tolist()
    contents = pb.InferTensorContents()
    getattr(contents, field).extend(values)
    return contents


def _texts(array: Array) -> list[bytes]:
    return [one.encode() if isinstance(one, str) else bytes(one) for one in array.ravel().tolist()]


def _checked(array: Array, datatype: str) -> Array:
    if array.dtype.newbyteorder("<") != _DTYPES[datatype]:
        raise TypeError(f"an output of datatype {datatype} has dtype {array.dtype}")
    return array.astype(_DTYPES[datatype], copy=False)
