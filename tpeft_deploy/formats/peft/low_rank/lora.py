"""LoRA as PEFT saves it, with rsLoRA, DoRA, biases and patterns (arXiv 2106.09685, 2312.03732, 2402.09353).

    dW = s B A        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

    layer            tensors                                                       weight
    Linear           lora_A.weight (r, I), lora_B.weight (O, r)                    (O, I)
    Conv1D           the same                                                      (I, O)
    Conv1d/2d/3d     lora_A.weight (r, I, K1, ...), lora_B.weight (O, r, 1, ...)   (O, I, K1, ...)
    Embedding        lora_embedding_A (r, N), lora_embedding_B (D, r)              (N, D)

With lora_magnitude_vector m (DoRA) the adapted weight is m / |W + dW| times W + dW.  s times lora_B.bias is added to
the bias.  The change of a convolution follows PEFT's merge; PEFT's unmerged branch ignores dilation and padding_mode.
"""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft import residual as peft_residual
from tpeft_deploy.formats.peft.config import alpha_of, base_bias, matrix_delta, of_type, stored_transposed
from tpeft_deploy.formats.peft.dense import misfit
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, doing, no_scale, reporting, take
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read", "scale_of"]

NAME = "peft-lora"
ABOUT = About(
    "PEFT",
    "LoRA, rsLoRA, DoRA, PiSSA, OLoRA",
    "linear, Conv1D, conv 1d to 3d, embedding",
    "for DoRA, lora_bias, PiSSA and OLoRA",
    "low-rank, gain, override",
    types=("LORA",),
)
_A, _B = "lora_A.weight", "lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
SUFFIXES = frozenset({_A, _B, _EMBEDDING_A, _EMBEDDING_B, _BIAS, _MAGNITUDE})
matches = of_type("LORA", _A, _B, _EMBEDDING_A, _EMBEDDING_B)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, with a gain for DoRA and the whole new bias for lora_bias.

    Raises:
        FormatError: a tensor is missing or does not fit; the configuration lacks lora_alpha; the convolution is
            grouped; or the base is needed and was not given.
    """
    target = f"{module.name}.weight"
    with reporting(module, checkpoint):
        delta, axis = _delta(module, checkpoint)
        gains = {}
        if _MAGNITUDE in module.tensors:
            gains = {target: _dora_gain(module, checkpoint, delta, axis)}
        overrides = {}
        if _BIAS in module.tensors:
            overrides = {f"{module.name}.bias": _bias(module, checkpoint, delta.scale)}
    return Change(deltas={target: delta}, overrides=overrides, gains=gains)


def scale_of(checkpoint: Checkpoint, name: str, rank: int) -> float:
    """Compute the factor s of a module by its name and rank, with alpha_pattern.

    Raises:
        FormatError: the configuration has no finite lora_alpha, or another rank.
    """
    alpha = alpha_of(checkpoint, name, rank, "lora_alpha")
    return alpha / (math.sqrt(rank) if checkpoint.config.get("use_rslora") else rank)


def _delta(module: Module, checkpoint: Checkpoint) -> tuple[TuckerDelta, int]:
    """The change, and the output axis of the weight, along which DoRA rescales."""
    no_scale(module, checkpoint)
    if _EMBEDDING_A in module.tensors or _EMBEDDING_B in module.tensors:
        rows, columns = take(module, checkpoint, _EMBEDDING_A), take(module, checkpoint, _EMBEDDING_B)
        return matrix_delta(rows.T, columns.T, scale_of(checkpoint, module.name, rows.shape[0])), 1
    down, up = take(module, checkpoint, _A), take(module, checkpoint, _B)
    scale = scale_of(checkpoint, module.name, down.shape[0])
    if down.ndim > 2:
        return _convolution(module, checkpoint, down, up, scale), 0
    transposed = stored_transposed(module, checkpoint, up.shape[0], down.shape[1])
    delta = matrix_delta(up, down, scale, transposed=transposed)
    delta = peft_residual.subtract_initial(module, checkpoint, delta, transposed=transposed)
    return delta, int(transposed)


def _convolution(module: Module, checkpoint: Checkpoint, down: Array, up: Array, scale: float) -> TuckerDelta:
    if up.shape[1] != down.shape[0]:
        raise FormatError(
            doing(module, checkpoint),
            expected="a convolution of one group",
            got=f"lora_A of {down.shape[0]} channels that lora_B takes in groups of {up.shape[1]}: each group of "
            "outputs then sees all inputs, which a weight in groups cannot hold",
            fix="Train again without this layer in target_modules, or with a method that keeps the groups, such as "
            "LoHa, LoKr or tpeft_deploy.training.",
        )
    return TuckerDelta(down, (up.reshape(up.shape[:2]), *[None] * (down.ndim - 1)), scale)


def _dora_gain(module: Module, checkpoint: Checkpoint, delta: TuckerDelta, axis: int) -> Array:
    """The magnitude over the norm of W + dW along all axes but `axis`, of a shape that broadcasts against W."""
    weight = base_array(module, checkpoint, "weight", "DoRA's gain depends on the base's weight")
    magnitude = take(module, checkpoint, _MAGNITUDE)
    if delta.shape != weight.shape or magnitude.size != weight.shape[axis]:
        expected = f"a change of shape {weight.shape} with {weight.shape[axis]} magnitudes, as the base's weight"
        raise misfit(module, checkpoint, expected, f"{delta.shape} with {magnitude.size}")
    adapted = weight.astype(np.float64) + delta.dense()
    others = tuple(a for a in range(weight.ndim) if a != axis)
    norm = np.sqrt(np.square(adapted).sum(axis=others, keepdims=True))
    if not norm.all():
        raise FormatError(doing(module, checkpoint), problem="a channel of W + dW is zero, which DoRA divides by")
    gain: Array = magnitude.astype(np.float64).reshape(norm.shape) / norm
    return gain.astype(np.promote_types(magnitude.dtype, np.float32))


def _bias(module: Module, checkpoint: Checkpoint, scale: float) -> Array:
    added = take(module, checkpoint, _BIAS)
    bias = base_bias(module, checkpoint, "lora_bias adds to the base's bias")
    if bias is None or bias.shape != added.shape:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a bias of shape {added.shape} in the base, which lora_bias adds to",
            got="none" if bias is None else bias.shape,
            fix="Train again with lora_bias=False for layers without a bias.",
        )
    return (bias + scale * added).astype(np.promote_types(added.dtype, np.float32))
