"""Outputs of the parts of a request, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tpeft_deploy.tucker import Array

__all__ = ["joined"]


def joined(
    parts: Sequence[Sequence[int]], outputs: Sequence[Mapping[str, Array | list[Array]]]
) -> dict[str, Array | list[Array]]:
    """Return the outputs of a request from those of its parts.

    Args:
        parts: for each part the indices of its rows in the request.
        outputs: for each part its outputs: an array, or a list of one a row.
    """
    if len(parts) == 1:
        return dict(outputs[0])
    return {name: _output(parts, [own[name] for own in outputs]) for name in outputs[0]}


def _output(parts: Sequence[Sequence[int]], own: Sequence[Array | list[Array]]) -> Array | list[Array]:
    rows = sum(len(part) for part in parts)
    placed: list[Array] = [np.empty(0)] * rows
    for part, values in zip(parts, own, strict=True):
        for index, row in enumerate(part):
            placed[row] = values[index]
    if any(isinstance(values, list) for values in own):
        return placed
    return np.stack(placed)
