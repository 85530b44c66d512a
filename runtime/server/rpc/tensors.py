"""Codec of tensors over gRPC: raw bytes or typed contents to NumPy arrays and back.

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

Raw tensors are little-endian and row-major; each element of BYTES is prefixed by its length in four bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tpeft_deploy.errors import ProtocolError
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.offload import PIECE, breathe
from tpeft_deploy.runtime.server.v2.tensors import DTYPES, check_shape, checked, from_raw, objects, quoted, texts
from tpeft_deploy.tucker import Array

__all__ = ["decode", "encode_contents", "has_contents"]

_STEP = 1 << 13  # elements converted to objects at once
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


def has_contents(datatype: str) -> bool:
    """Return whether the datatype can be sent as typed contents."""
    return datatype in _FIELDS


def decode(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | memoryview | None, limits: RpcLimits) -> Array:
    """Convert an input to an array.

    Args:
        tensor: name, datatype and shape, with the elements unless they are raw.
        raw: raw elements; None if the tensor has typed contents.
        limits: limits of shape and size, checked before memory is allocated.

    Returns:
        An array of the tensor's shape; a view of `raw` if the datatype has a fixed size.

    Raises:
        ProtocolError: unknown datatype, or elements that do not fit datatype and shape.
        TooLarge: more dimensions or elements than the limits allow.
    """
    doing = f"input {quoted(tensor.name)}"
    datatype = tensor.datatype
    count = check_shape(doing, tensor.shape, datatype, limits)
    flat = _from_contents(doing, tensor, count) if raw is None else from_raw(doing, datatype, raw, count)
    return flat.reshape(tuple(tensor.shape))


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
        return objects(values)
    flat = np.empty(count, wide)
    for at in _steps(count):
        flat[at : at + _STEP] = values[at : at + _STEP]
    narrow = DTYPES[tensor.datatype]
    exact = flat.astype(narrow, copy=False)
    if narrow != wide and not np.array_equal(exact, flat):
        raise ProtocolError(doing, expected=f"elements within {tensor.datatype}", got=f"{flat.min()} to {flat.max()}")
    return exact


def _steps(count: int) -> Iterator[int]:
    """Yield the start of each step; for many elements, let other threads run between steps (not on an event loop)."""
    for at in range(0, count, _STEP):
        if at and count > PIECE:  # more than an event loop ever converts
            breathe()
        yield at


def encode_contents(array: Array, datatype: str) -> pb.InferTensorContents:
    """Convert an output to typed contents; its datatype must satisfy `has_contents`.

    Raises:
        TypeError: the array does not have that datatype, which is a server error.
    """
    field, _ = _FIELDS[datatype]
    values = texts(array) if datatype == "BYTES" else checked(array, datatype).ravel()
    contents = pb.InferTensorContents()
    elements = getattr(contents, field)
    for at in _steps(len(values)):
        step = values[at : at + _STEP]
        elements.extend(step if isinstance(step, list) else step.tolist())
    return contents
