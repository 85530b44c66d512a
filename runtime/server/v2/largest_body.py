"""The largest body that a model's inputs can fill: what declares more is refused before it is read."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest

__all__ = ["largest_body"]

_NUMBER = 32  # bytes of a number in JSON, with what separates it from the next
_NAME = 512  # of an adapter's name, for each row
_REST = 256 << 10  # names, shapes, parameters


def largest_body(manifest: Manifest, rows: int | None) -> int | None:
    """Bytes of the largest useful request, in JSON or raw.

    Args:
        manifest: the model's inputs.
        rows: most rows of a request.

    Returns:
        None where rows, or an axis of an input other than the batch, have no bound.
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
