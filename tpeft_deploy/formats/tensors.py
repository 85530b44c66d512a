"""Reading a safetensors file into private memory, refusing whatever is damaged.

    8 bytes     length of the header, little-endian
    header      JSON: tensor name -> {dtype, shape, data_offsets: [begin, end]}, and __metadata__: name -> text
    data        the tensors, one after another without gaps

(The format's own description: https://github.com/huggingface/safetensors, "Format".)  Read here rather than by that
package's `deserialize`, which copies every tensor once more; a test compares the two.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.tucker import Array

__all__ = ["parse_json", "read_bytes", "read_tensors", "require_finite"]


_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # numpy has no bfloat16: widened to float32
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_MAX_HEADER = 16 * 2**20  # bytes: 100,000 tensors; what Python makes of a larger one outgrows the file


def read_bytes(path: Path) -> bytearray:
    """The whole file in memory of its own, which tensors can be views of; or a FormatError that names it."""
    try:
        with path.open("rb", buffering=0) as stream:
            data = bytearray(os.fstat(stream.fileno()).st_size)
            filled = 0
            while filled < len(data) and (count := stream.readinto(memoryview(data)[filled:])):
                filled += count
            return data if filled == len(data) else data[:filled]
    except OSError as error:
        raise FormatError(
            f"read {path}", problem=error.strerror or str(error), fix="Check the path and its permissions."
        ) from error


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text from outside.

    Raises:
        ValueError: it is not JSON, names something twice, or is nested beyond reason.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_tensors(data: bytes | bytearray, *, source: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a safetensors file held in memory.

    Args:
        data: the file's bytes; a bytearray is kept as the tensors' memory, bytes are copied.
        source: where they came from, for messages.

    Returns:
        Views into `data` (float32 copies where the file has bfloat16, which is exact), and the file's metadata.

    Raises:
        FormatError: the bytes are truncated, not safetensors, or a floating point tensor is not finite.
    """
    # Writable, as arrays from elsewhere are; torch.from_numpy refuses others.
    data = data if isinstance(data, bytearray) else bytearray(data)
    try:
        header, start = _header(data)
        metadata = header.pop("__metadata__", None) or {}
        _check_layout(header, metadata, len(data) - start)
        tensors = {name: _array(entry, data, start) for name, entry in header.items()}
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        problem = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise FormatError(
            f"read {source}",
            expected="a complete safetensors file",
            got=f"{len(data)} bytes that are not one ({problem[:200]})",
            fix="Copy or save the adapter again.",
        ) from error
    require_finite(tensors, source=source)
    return tensors, metadata


def require_finite(tensors: dict[str, Array], *, source: str) -> None:
    """Refuse a floating point tensor that holds NaN or infinity, naming it."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            bad = int(tensor.size - np.isfinite(tensor).sum())
            raise FormatError(
                f"read {source}, tensor {name!r}",
                expected="finite values",
                got=f"{bad} of {tensor.size} NaN or infinite",
                fix="Save the adapter again from a training run that did not diverge.",
            )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _header(data: bytearray) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, _MAX_HEADER):
        raise ValueError(f"a header of {length} bytes")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise TypeError("a header that is no JSON object")
    return header, 8 + length


def _check_layout(header: dict[str, Any], metadata: dict[str, str], length: int) -> None:
    """Every tensor has the bytes that its shape needs, and together they are the whole data, each byte once."""
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that is not text")
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        sizes = entry["shape"]
        if not all(type(size) is int and size >= 0 for size in [begin, end, *sizes]):
            raise ValueError(f"tensor {name!r} with offsets {begin}, {end} and shape {sizes}")
        needed = math.prod(sizes) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
        if begin != position or end - begin != needed:
            raise ValueError(f"tensor {name!r} of {needed} bytes at {begin} to {end}, expected at {position}")
        position = end
    if position != length:
        raise ValueError(f"{length} bytes of data for tensors of {position}")


def _array(entry: dict[str, Any], data: bytearray, start: int) -> Array:
    begin, shape = entry["data_offsets"][0], entry["shape"]
    array: Array = np.frombuffer(data, _DTYPES[entry["dtype"]], math.prod(shape), start + begin).reshape(shape)
    if entry["dtype"] != "BF16":
        return array
    # A bfloat16 is the upper half of a float32, so widening is exact.
    wide = array.astype("<u4")
    wide <<= 16
    return wide.view("<f4")
