"""C3A as PEFT saves it: a change with circulant blocks (arXiv 2407.19342).

    dW[m b + t, n b + j] = k[m, n, (j - t) mod b] / I        c3a_kernel (O / b, I / b, b)

PEFT computes the convolution with a Fourier transform in float32; here it is summed directly.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import of_type
from tpeft_deploy.formats.peft.dense import dense_change, linear_layer, misfit
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-c3a"
ABOUT = About("PEFT", "C3A", "linear", "yes", "dense", types=("C3A",))
_KERNEL = "c3a_kernel"
SUFFIXES = frozenset({_KERNEL})
matches = of_type("C3A", _KERNEL)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, dense: circulant blocks have full rank.

    Raises:
        FormatError: no base was given (needed for the size of the layer), or the kernel does not fit it.
    """
    no_scale(module, checkpoint)
    kernel = widen(take(module, checkpoint, _KERNEL))
    layer = linear_layer(module, checkpoint, "the kernel is checked against the size of the layer")
    rows, columns, block = kernel.shape if kernel.ndim == 3 else (0, 0, 0)
    if (rows * block, columns * block) != (layer.outputs, layer.inputs):
        raise misfit(module, checkpoint, f"blocks of a weight {(layer.outputs, layer.inputs)}", kernel.shape)
    steps = np.arange(block)
    blocks = kernel[:, :, (steps[None, :] - steps[:, None]) % block]  # (O / b, I / b, b, b)
    change = blocks.transpose(0, 2, 1, 3).reshape(layer.outputs, layer.inputs)
    return dense_change(module, change / layer.inputs)
