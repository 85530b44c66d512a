"""Readers of PEFT's methods with circulant blocks, frequencies or wavelets."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.algebra import widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import matrix_delta, number
from tpeft_deploy.formats.peft.dense import Linear, dense_change, linear_layer, whole_number
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.read.torch_random import LIMIT, first_of_permutation
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array

__all__ = ["places", "read_c3a", "read_fourierft", "read_waveft"]

_KERNEL = "c3a_kernel"


@reader("peft-c3a", About("PEFT", "C3A", "linear", "yes", "dense", types=("C3A",)), {_KERNEL})
def read_c3a(module: Module) -> Change:
    """C3A as PEFT saves it: a change with circulant blocks (arXiv 2407.19342).

        dW[m b + t, n b + j] = k[m, n, (j - t) mod b] / I        c3a_kernel (O / b, I / b, b)

    PEFT computes the convolution with a Fourier transform in float32; here it is summed directly.
    """
    module.no_scale()
    kernel = widen(module.take(_KERNEL))
    layer = linear_layer(module, "the kernel is checked against the size of the layer")
    rows, columns, block = kernel.shape if kernel.ndim == 3 else (0, 0, 0)
    if (rows * block, columns * block) != (layer.outputs, layer.inputs):
        raise module.misfit(f"blocks of a weight {(layer.outputs, layer.inputs)}", kernel.shape)
    steps = np.arange(block)
    blocks = kernel[:, :, (steps[None, :] - steps[:, None]) % block]  # (O / b, I / b, b, b)
    change = blocks.transpose(0, 2, 1, 3).reshape(layer.outputs, layer.inputs)
    return dense_change(module, change / layer.inputs)


_FOURIERFT_SPECTRUM = "fourierft_spectrum"


@reader(
    "peft-fourierft",
    About("PEFT", "FourierFT", "linear, Conv1D", "yes", "low-rank, dense", types=("FOURIERFT",)),
    {_FOURIERFT_SPECTRUM},
)
def read_fourierft(module: Module) -> Change:
    """FourierFT as PEFT saves it: a change with few frequencies, each at a random position (arXiv 2405.03003).

        dW = s Re(ifft2(F)), F[p] = fourierft_spectrum at the first n positions p of a permutation of O I

    The file does not hold the positions: they are drawn from `random_loc_seed` by torch's generator.  With few
    frequencies the change has a low rank: F[j, k] adds f / (O I) times the real part of a complex exponential, which is
    cos(2 pi j o / O) cos(2 pi k i / I) - sin(2 pi j o / O) sin(2 pi k i / I), of rank 2.
    """
    module.no_scale()
    spectrum = widen(module.take(_FOURIERFT_SPECTRUM))
    layer = linear_layer(module, "places of frequencies depend on the size of the layer")
    rows, columns = places(module, spectrum, layer)
    scale = number(module.checkpoint, "scaling")
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


def places(module: Module, spectrum: Array, layer: Linear) -> tuple[Array, Array]:
    """Compute rows and columns of a spectrum's values from `random_loc_seed`.

    Raises:
        FormatError: the spectrum has more values than the weight has elements, or none, or the weight is too large.
    """
    if spectrum.ndim != 1 or not 0 < spectrum.size <= layer.size:
        raise module.misfit(f"1 to {layer.size} numbers for a weight of as many", spectrum.shape)
    if layer.size >= LIMIT:
        raise module.misfit(f"a weight of fewer than {LIMIT} elements, for which positions are known", layer.size)
    flat = first_of_permutation(whole_number(module.checkpoint, "random_loc_seed"), layer.size, spectrum.size)
    return flat // layer.inputs, flat % layer.inputs


def _waves(frequencies: Array, size: int) -> Array:
    """Cosines and then sines of each frequency, (size, 2 n)."""
    angles = 2 * np.pi / size * (np.outer(np.arange(size), frequencies) % size)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


_WAVEFT_SPECTRUM = "waveft_spectrum"
_HAAR = frozenset({"db1", "haar"})


@reader(
    "peft-waveft",
    About("PEFT", "WaveFT", "linear, Conv1D", "yes", "dense", "the Haar wavelet (db1) alone", types=("WAVEFT",)),
    {_WAVEFT_SPECTRUM},
)
def read_waveft(module: Module) -> Change:
    """WaveFT as PEFT saves it: a change with few wavelet coefficients, each at a random position.

    The coefficients form a matrix of even sizes, with positions as in FourierFT; the quarters of the matrix are the
    approximation A and the details H, V and D.  One step of the inverse transform with the Haar wavelet (db1) is

        dW[2 i + p, 2 j + q] = s / 2 (A + (-1)^p H + (-1)^q V + (-1)^(p + q) D)[i, j]

    Without `use_idwt` the coefficients times s are the change.
    """
    module.no_scale()
    spectrum = widen(module.take(_WAVEFT_SPECTRUM))
    layer = linear_layer(module, "places of coefficients depend on the size of the layer")
    family = module.checkpoint.config.get("wavelet_family")
    if module.checkpoint.config.get("use_idwt") and family not in _HAAR:
        raise FormatError(
            module.doing,
            expected="the wavelet db1",
            got=f"wavelet_family={family!r}, which this version does not support",
            fix="Merge it with PEFT's merge_and_unload and export the merged model as a separate base.",
        )
    rows, columns = places(module, spectrum, layer)
    even = (layer.outputs + layer.outputs % 2, layer.inputs + layer.inputs % 2)
    coefficients = np.zeros(even, spectrum.dtype)
    coefficients[rows, columns] = spectrum * number(module.checkpoint, "scaling")
    change = _inverse(coefficients) if module.checkpoint.config.get("use_idwt") else coefficients
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
