"""OFT as PEFT saves it: blocks of a layer's inputs are rotated (arXiv 2306.07280, 2506.19847).

y = W (x B) + b        W' = W B^T        B = blockdiag(R_1 .. R_n)        oft_R.weight (n, b (b - 1) / 2)

Each row is the upper triangle of a skew-symmetric Q with R = (I - Q) (I + Q)^-1, or with use_cayley_neumann the Neumann
sum truncated after num_cayley_neumann_terms, which is not an exact rotation.  coft first limits the norm of each Q to
eps; block_share repeats one block.  For an embedding the rows are rotated: W' = W B, oft_embedding_R.weight.

Convolutions are read only with a kernel of 1: for larger kernels PEFT rotates overlapping patches and adds them up,
which is no change of the weight (merge and forward of PEFT differ).
"""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import (
    base_weight,
    cayley,
    change_of_base,
    dense_change,
    rotate_inputs,
    skew_of_triangle,
)
from tpeft_deploy.formats.peft.config import number, of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "MAY_BE_EMPTY", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-oft"
ABOUT = About("PEFT", "OFT", "linear, embedding, conv with a kernel of 1", "yes", "dense", types=("OFT",))
_LAYER, _EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"
SUFFIXES = MAY_BE_EMPTY = frozenset({_LAYER, _EMBEDDING})  # blocks of size 1 have no angle
_MOST_TERMS = 100
matches = of_type("OFT", *SUFFIXES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W' - W.

    Raises:
        FormatError: no base was given, the rotations do not fit it, the kernel is larger than 1, or the configuration
            lacks a setting of the rotations.
    """
    weight = base_weight(module, checkpoint, "OFT")
    embedding = _EMBEDDING in module.tensors
    angles = take(module, checkpoint, _EMBEDDING if embedding else _LAYER)
    if math.prod(weight.shape[2:]) != 1:
        raise FormatError(
            doing(module, checkpoint),
            expected="a linear layer, an embedding, or a convolution with a kernel of 1",
            got=f"a kernel of {weight.shape[2:]}: PEFT's OFT adds up its rotated patches where they overlap, which is "
            "no change of the weight",
            fix="Train again without this layer in target_modules, or with BOFT or HRA, which change its weight.",
        )
    with reporting(module, checkpoint):
        flat = weight.reshape(len(weight), -1)
        blocks = _blocks(checkpoint, angles, flat.shape[1], 1 if weight.ndim == 2 else len(weight))
        if weight.ndim == 2 and len(blocks) * blocks.shape[1] != flat.shape[1]:
            raise ValueError(f"{len(blocks)} blocks of size {blocks.shape[1]} for a weight of shape {weight.shape}")
        adapted = rotate_inputs(flat, blocks.swapaxes(1, 2) if embedding else blocks)
        return change_of_base(module, checkpoint, dense_change(adapted, weight, angles))


def _blocks(checkpoint: Checkpoint, angles: Array, inputs: int, groups: int) -> Array:
    """Compute the matrices R (n, b, b) for a weight with `inputs` per group and at most `groups` groups."""
    count, elements = angles.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    fits = size * (size - 1) // 2 == elements and size <= inputs
    if not fits or not 0 < count * size <= inputs * max(1, groups):
        raise ValueError(f"angles of shape {angles.shape}, which are those of no blocks within {inputs} inputs")
    values = angles.astype(np.float64)
    if checkpoint.config.get("coft"):
        values = _shortened(values, number(checkpoint.config, "eps", checkpoint.source))
    blocks = _matrices(checkpoint, values, size)
    if checkpoint.config.get("block_share"):
        if count != 1:
            raise ValueError(f"{count} blocks, although block_share is set")
        return np.broadcast_to(blocks, (inputs // size, size, size))
    return blocks


def _matrices(checkpoint: Checkpoint, values: Array, size: int) -> Array:
    config = checkpoint.config
    if not isinstance(config.get("use_cayley_neumann"), bool):
        raise FormatError(
            f"read {checkpoint.source}, adapter_config.json",
            expected="true or false as use_cayley_neumann",
            got=repr(config.get("use_cayley_neumann")),
            fix="Save the adapter again with save_pretrained of PEFT 0.18 or newer.",
        )
    if not config["use_cayley_neumann"]:
        return cayley(skew_of_triangle(values, size))
    terms = number(config, "num_cayley_neumann_terms", checkpoint.source)
    if terms != int(terms) or not 1 <= terms <= _MOST_TERMS:
        raise FormatError(
            f"read {checkpoint.source}, adapter_config.json",
            expected=f"a whole number from 1 to {_MOST_TERMS} as num_cayley_neumann_terms",
            got=f"{terms:g}",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        return _neumann(skew_of_triangle(values, size), int(terms))


def _neumann(skew: Array, terms: int) -> Array:
    """Compute I + 2 Q + 2 Q^2 + ... + Q^m as PEFT truncates it: the last power counts once; 3 terms equal 4."""
    total = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def _shortened(values: Array, eps: float) -> Array:
    """Limit the Frobenius norm of each Q to eps / sqrt(n), computed in float32 as in PEFT."""
    limit = float(np.float32(eps) / np.sqrt(np.float32(len(values))))
    norm = np.sqrt(2 * np.square(values).sum(axis=1, keepdims=True))
    return np.where(norm <= limit, values, limit * values / np.where(norm > 0, norm, 1))
