"""Arrays in a bundle: base weights, read from weights.data and offered to readers of adapters, and example inputs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest, Weight
from tpeft_deploy.errors import IntegrityError
from tpeft_deploy.formats.read.base_view import Lazy
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.tucker import Array

__all__ = ["read_arrays", "read_weight", "view_of"]


def read_arrays(file: Path, names: Sequence[str]) -> dict[str, Array]:
    """Read contiguous arrays from an .npz file.

    Raises:
        IntegrityError: the file cannot be read, or lacks an array.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name], order="C") for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"read {file}", expected=f"one array for each of {', '.join(names)}", got=str(error)
        ) from error


def read_weight(file: Path, weight: Weight) -> Array:
    """Read a weight from a weights.data: (O, I, K1, ...); bfloat16 as float32.

    A weight that the graphs hold quantised is filled with NaN.
    """
    if not weight.length:
        # Quantised in the graphs: its shape is valid, and any result computed from it is refused as not finite.
        return np.full(weight.shape, np.nan, np.float32)
    with file.open("rb") as stream:
        stream.seek(weight.offset)
        data = stream.read(weight.length)
    if weight.dtype == "bfloat16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(weight.shape)
    return np.frombuffer(data, weight.dtype).reshape(weight.shape).copy()


def view_of(name: str, manifest: Manifest, base_value: Callable[[str], Array]) -> BaseView:
    """Base weights of one graph for `load_adapter(base=...)`, each read on access.

    Args:
        name: name for messages.
        manifest: manifest of the graph.
        base_value: function that reads a weight by its stored name.
    """
    stored = dict(manifest.stored)
    for group in manifest.ties:  # a name that no forward pass reads has the values of a tied name
        held = next((stored[other] for other in group if other in stored), None)
        stored |= {other: held for other in group if held is not None and other not in stored}
    values = Lazy(stored, lambda other: base_value(stored[other]))
    known = {other: manifest.weights[held] for other, held in stored.items()}
    shapes = {other: weight.shape for other, weight in known.items()}
    return BaseView(name, values, shapes=shapes, digests={other: weight.digest for other, weight in known.items()})
