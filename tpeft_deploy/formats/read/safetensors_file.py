"""Reading a safetensors file into private memory, refusing whatever is damaged.

The safetensors package checks the layout; what it lets pass is refused here first: a header that names a tensor
twice (the package keeps the last), and one so large that reading it outgrows the file.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.errors import FormatError, brief
from tpeft_deploy.tucker import Array, is_finite

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
_MOST_TENSORS = 160_000  # which have less than 105 bytes of such a header each; their entries alone take 60
_LONGEST_NAME = 2_000  # letters
_MAX_HEADER = 16 * 2**20  # bytes: 100,000 tensors; what Python makes of a larger one outgrows the file


def read_bytes(path: Path) -> bytes:
    """The whole file, or a FormatError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(
            f"read {path}", problem=error.strerror or str(error), fix="Check the path and its permissions."
        ) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text from outside.

    Raises:
        ValueError: it is not JSON, names something twice, or is nested beyond reason.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except MemoryError as error:
        raise ValueError("more than the memory there is holds") from error


def read_tensors(data: bytes, *, source: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a safetensors file held in memory.

    Args:
        data: the file's bytes.
        source: path they were read from, for messages.

    Returns:
        Tensors (float32 where the file has bfloat16, which is exact), and the file's metadata.

    Raises:
        FormatError: the bytes are truncated, not safetensors, or a floating point tensor is not finite.
    """
    from safetensors import SafetensorError

    try:
        metadata = _metadata(data)
        tensors = _arrays(data)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
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
        if tensor.dtype.kind == "f" and not is_finite(tensor):
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
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{brief(repr(name))} stands there twice")
    return found


def _metadata(data: bytes) -> dict[str, str]:
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, _MAX_HEADER):
        raise ValueError(f"a header of {length} bytes")
    header = parse_json(data[8 : 8 + length])
    if len(header) > _MOST_TENSORS:
        raise ValueError(f"a header of {len(header)} tensors, where {_MOST_TENSORS} are read")
    long = next((name for name in header if len(name) > _LONGEST_NAME), None)
    if long is not None:
        raise ValueError(f"a name of {len(long)} letters, where {_LONGEST_NAME} are read: {brief(repr(long), 80)}")
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _arrays(data: bytes) -> dict[str, Array]:
    from safetensors import deserialize

    entries: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    arrays = {}
    while entries:  # taken out one by one, so that a tensor that is widened does not stay beside its copy
        name, entry = entries.pop()
        arrays[name] = _array(entry["dtype"], entry["shape"], entry["data"])
    return arrays


def _array(dtype: str, shape: list[int], data: bytearray) -> Array:
    array: Array = np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
    if dtype != "BF16":
        return array
    # A bfloat16 is the upper half of a float32, so widening is exact.
    wide = array.astype("<u4")
    wide <<= 16
    return wide.view("<f4")
