"""WaveFT as PEFT saves it: a change with few wavelet coefficients, each at a random position.

The coefficients form a matrix of even sizes, with positions as in FourierFT; the quarters of the matrix are the
approximation A and the details H, V and D.  One step of the inverse transform with the Haar wavelet (db1) is

    dW[2 i + p, 2 j + q] = s / 2 (A + (-1)^p H + (-1)^q V + (-1)^(p + q) D)[i, j]

Without `use_idwt` the coefficients times s are the change.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import number, of_type
from tpeft_deploy.formats.peft.dense import dense_change, linear_layer
from tpeft_deploy.formats.peft.spectral.fourierft import places
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-waveft"
ABOUT = About("PEFT", "WaveFT", "linear, Conv1D", "yes", "dense", "the Haar wavelet (db1) alone", types=("WAVEFT",))
_SPECTRUM = "waveft_spectrum"
SUFFIXES = frozenset({_SPECTRUM})
_HAAR = frozenset({"db1", "haar"})
matches = of_type("WAVEFT", _SPECTRUM)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, dense.

    Raises:
        FormatError: no base was given (needed for the size of the layer), the spectrum does not fit it, or the wavelet
            is another than Haar's.
    """
    no_scale(module, checkpoint)
    spectrum = widen(take(module, checkpoint, _SPECTRUM))
    layer = linear_layer(module, checkpoint, "places of coefficients depend on the size of the layer")
    family = checkpoint.config.get("wavelet_family")
    if checkpoint.config.get("use_idwt") and family not in _HAAR:
        raise FormatError(
            doing(module, checkpoint),
            expected="the wavelet db1",
            got=f"wavelet_family={family!r}, which this version does not support",
            fix="Merge it with PEFT's merge_and_unload and export the merged model as a separate base.",
        )
    rows, columns = places(module, checkpoint, spectrum, layer)
    even = (layer.outputs + layer.outputs % 2, layer.inputs + layer.inputs % 2)
    coefficients = np.zeros(even, spectrum.dtype)
    coefficients[rows, columns] = spectrum * number(checkpoint.config, "scaling", checkpoint.source)
    change = _inverse(coefficients) if checkpoint.config.get("use_idwt") else coefficients
    change = np.ascontiguousarray(change[: layer.outputs, : layer.inputs])
    return dense_change(module, change, transposed=layer.transposed)


def _inverse(coefficients: Array) -> Array:
    """One step of the inverse Haar transform of a matrix of even sizes."""
    height, width = (size // 2 for size in coefficients.shape)
    (mean, across), (along, both) = np.swapaxes(coefficients.reshape(2, height, 2, width), 1, 2)
    change = np.empty_like(coefficients)
    for row, column in np.ndindex(2, 2):
        down, right = (-1) ** row, (-1) ** column
        change[row::2, column::2] = (mean + down * across + right * along + down * right * both) / 2
    return change
