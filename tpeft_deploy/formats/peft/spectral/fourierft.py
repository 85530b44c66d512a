"""FourierFT as PEFT saves it: a change with few frequencies, each at a random position (arXiv 2405.03003).

    dW = s Re(ifft2(F)), F[p] = fourierft_spectrum at the first n positions p of a permutation of O I

The file does not hold the positions: they are drawn from `random_loc_seed` by torch's generator.  With few frequencies
the change has a low rank: F[j, k] adds f / (O I) times the real part of a complex exponential, which is
cos(2 pi j o / O) cos(2 pi k i / I) - sin(2 pi j o / O) sin(2 pi k i / I), of rank 2.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import matrix_delta, number, of_type
from tpeft_deploy.formats.peft.dense import Linear, dense_change, linear_layer, misfit, whole_number
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, take
from tpeft_deploy.formats.read.torch_random import LIMIT, first_of_permutation
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "places", "read"]

NAME = "peft-fourierft"
ABOUT = About("PEFT", "FourierFT", "linear, Conv1D", "yes", "low-rank, dense", types=("FOURIERFT",))
_SPECTRUM = "fourierft_spectrum"
SUFFIXES = frozenset({_SPECTRUM})
matches = of_type("FOURIERFT", _SPECTRUM)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change: of rank 2 n if that has fewer elements, else dense.

    Raises:
        FormatError: no base was given (needed for the size of the layer), or the spectrum does not fit it.
    """
    no_scale(module, checkpoint)
    spectrum = widen(take(module, checkpoint, _SPECTRUM))
    layer = linear_layer(module, checkpoint, "places of frequencies depend on the size of the layer")
    rows, columns = places(module, checkpoint, spectrum, layer)
    scale = number(checkpoint.config, "scaling", checkpoint.source)
    if 2 * spectrum.size * (layer.outputs + layer.inputs) < layer.size:
        up, down = _waves(rows, layer.outputs), _waves(columns, layer.inputs)
        core = np.diag(np.concatenate([spectrum, -spectrum])) / layer.size
        factors = up.astype(spectrum.dtype), down.T.astype(spectrum.dtype)
        delta = matrix_delta(*factors, scale, transposed=layer.transposed, core=core.astype(spectrum.dtype))
        return Change(deltas={f"{module.name}.weight": delta})
    frequencies = np.zeros((layer.outputs, layer.inputs), spectrum.dtype)
    frequencies[rows, columns] = spectrum
    change = (np.fft.ifft2(frequencies).real * scale).astype(spectrum.dtype)
    return dense_change(module, change, transposed=layer.transposed)


def places(module: Module, checkpoint: Checkpoint, spectrum: Array, layer: Linear) -> tuple[Array, Array]:
    """Compute rows and columns of a spectrum's values from `random_loc_seed`.

    Raises:
        FormatError: the spectrum has more values than the weight has elements, or none, or the weight is too large.
    """
    if spectrum.ndim != 1 or not 0 < spectrum.size <= layer.size:
        raise misfit(module, checkpoint, f"1 to {layer.size} numbers for a weight of as many", spectrum.shape)
    if layer.size >= LIMIT:
        raise misfit(
            module, checkpoint, f"a weight of fewer than {LIMIT} elements, for which positions are known", layer.size
        )
    flat = first_of_permutation(whole_number(checkpoint, "random_loc_seed"), layer.size, spectrum.size)
    return flat // layer.inputs, flat % layer.inputs


def _waves(frequencies: Array, size: int) -> Array:
    """Cosines and then sines of each frequency, (size, 2 n)."""
    angles = 2 * np.pi / size * (np.outer(np.arange(size), frequencies) % size)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
