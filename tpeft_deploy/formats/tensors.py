"""Reading a safetensors file into private memory, refusing whatever is damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.tucker import Array

__all__ = ["read_bytes", "read_tensors", "require_finite"]


_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}


def read_bytes(path: Path) -> bytes:
    """The whole file, or a FormatError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(
            f"read {path}", problem=error.strerror or str(error), fix="Check the path and its permissions."
        ) from error


def read_tensors(data: bytes, *, source: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a safetensors file held in memory.

    Args:
        data: the file's bytes.
        source: where they came from, for messages.

    Returns:
        Tensors as float32 where the file has bfloat16, which is exact, and the file's metadata.

    Raises:
        FormatError: the bytes are truncated, not safetensors, or a floating point tensor is not finite.
    """
    from safetensors import SafetensorError

    try:
        tensors = {name: _array(entry["dtype"], entry["shape"], entry["data"]) for name, entry in _entries(data)}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FormatError(
            f"read {source}",
            expected="a complete safetensors file",
            got=f"{len(data)} bytes that are not one ({error})",
            fix="Copy or save the adapter again.",
        ) from error
    require_finite(tensors, source=source)
    return tensors, _metadata(data)


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


def _entries(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    from safetensors import deserialize

    entries: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    return entries


def _array(dtype: str, shape: list[int], data: bytes | bytearray) -> Array:
    if dtype == "BF16":
        # numpy has no bfloat16; it is the upper half of a float32, so widening is exact.
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _metadata(data: bytes) -> dict[str, str]:
    # deserialize drops the header's metadata; its length stands in the first 8 bytes, checked by load.
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata
