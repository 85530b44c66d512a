"""RandLoRA as PEFT saves it: a sum of random bases, scaled by trained numbers, of full rank (arXiv 2502.00987).

    dW = s sum_j b_j a_j^T, or its transpose if the layer has fewer outputs than inputs; s = alpha / r
    b_j: column j of randlora_B[:max, :n] (max, n, r), flattened to (max, n r)
    a_j: row j of lambda[:, :, None] A[:, :, :min] gamma (r, n, min), flattened to (r n, min)

randlora_lambda (r, n) and randlora_gamma (n, min) are the module's; randlora_A (r, 1, min of all layers) and
randlora_B (max of all layers, N, r) are shared, and repeated in the file for every module.  min and max are those of
(O, I).

Without save_projection PEFT regenerates A and B from `projection_prng_key`, in bfloat16 or float16 depending on the
device: such files are refused.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import number, of_type
from tpeft_deploy.formats.peft.dense import Linear, dense_change, linear_layer, misfit, no_projection
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SHARED", "SUFFIXES", "matches", "read"]

NAME = "peft-randlora"
ABOUT = About("PEFT", "RandLoRA", "linear, Conv1D", "yes", "dense", "saved with save_projection", types=("RANDLORA",))
_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_PROJECTIONS = ("randlora_A", "randlora_B")
SUFFIXES = frozenset({_LAMBDA, _GAMMA, *_PROJECTIONS})
SHARED = frozenset(f"base_model.{name}" for name in _PROJECTIONS)
matches = of_type("RANDLORA", _LAMBDA)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, dense.

    Raises:
        FormatError: no base was given (needed for the size of the layer); the file has no projections; or a tensor is
            missing or does not fit.
    """
    no_scale(module, checkpoint)
    outer, inner = take(module, checkpoint, _LAMBDA), take(module, checkpoint, _GAMMA)
    small, large = (_projection(module, checkpoint, name) for name in _PROJECTIONS)
    layer = linear_layer(module, checkpoint, "RandLoRA's bases do not record the size of a layer")
    _check(module, checkpoint, layer, outer, inner, small, large)
    rank = number(checkpoint.config, "r", checkpoint.source)
    if rank != outer.shape[0]:
        raise misfit(module, checkpoint, f"tensors of rank {rank:g}, as in adapter_config.json", outer.shape[0])
    scale = number(checkpoint.config, "randlora_alpha", checkpoint.source) / rank
    with reporting(module, checkpoint):
        smallest, largest = sorted((layer.outputs, layer.inputs))
        scaled = outer[:, :, None].astype(np.float64) * small[:, :, :smallest] * inner
        bases = large[:largest, : inner.shape[0]].reshape(largest, -1)
        change = np.matmul(bases, scaled.reshape(-1, smallest)) * scale
        change = change.astype(widen(outer[:0]).dtype)
    return dense_change(module, change if layer.outputs == largest else change.T, transposed=layer.transposed)


def _check(
    module: Module, checkpoint: Checkpoint, layer: Linear, outer: Array, inner: Array, small: Array, large: Array
) -> None:
    smallest, largest = sorted((layer.outputs, layer.inputs))
    if outer.ndim == 2 and outer.size and small.ndim == large.ndim == 3:
        rank, bases = outer.shape
        if (
            bases == -(-smallest // rank)
            and inner.shape == (bases, smallest)
            and small.shape[:2] == (rank, 1)
            and small.shape[2] >= smallest
            and large.shape[0] >= largest
            and large.shape[1] >= bases
            and large.shape[2] == rank
        ):
            return
    raise misfit(
        module,
        checkpoint,
        f"scales (r, n) and (n, {smallest}) with n r at least {smallest}, and bases at least as large as the weight",
        f"{outer.shape} and {inner.shape}, {small.shape} and {large.shape}",
    )


def _projection(module: Module, checkpoint: Checkpoint, name: str) -> Array:
    """The projection, from the module's copy or from the shared tensors, which are equal."""
    copies = [module.tensors.pop(name, None), checkpoint.shared.get(f"base_model.{name}")]
    found = [copy for copy in copies if copy is not None]
    if not found:
        raise no_projection(module, checkpoint, f"the shared projection base_model.{name}")
    if not np.array_equal(found[0], found[-1]):
        raise misfit(module, checkpoint, f"one {name} for all modules", "one that differs")
    return found[-1]
