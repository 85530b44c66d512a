"""Size of the largest body that a model's inputs can fill; larger declared sizes are refused unread."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest

__all__ = ["largest_body"]

_NUMBER = 32  # bytes of a number in JSON, with its separator
_NAME = 512  # bytes of an adapter's name, per row
_REST = 256 << 10  # bytes of names, shapes and parameters


def largest_body(manifest: Manifest, rows: int | None) -> int | None:
    """Return the size in bytes of the largest useful request, in JSON or raw.

    Args:
        manifest: manifest with the model's inputs.
        rows: maximum rows of a request.

    Returns:
        None if the rows, or a non-batch axis of an input, are unbounded.
    """
    if rows is None:
        return None
    bytes_of_rows = _NAME * rows
    for port in manifest.inputs:
        sizes = [rows if size == manifest.batch_axis else size for size in port.shape]
        if any(isinstance(size, str) for size in sizes):
            return None
        count = math.prod(int(size) for size in sizes)
        bytes_of_rows += count * max(_NUMBER, np.dtype(port.dtype).itemsize)
    return bytes_of_rows + _REST
