"""GraLoRA as PEFT saves it: LoRA in k x k blocks (arXiv 2505.20355), and plain LoRA of rank h beside it.

    block (j, n) of dW = s B_j[n]^T A_n[j]^T, plus s B A        s = alpha / (r + h)

gralora_A (k, I / k, r) and gralora_B (k, r, O / k): A_n[j] are columns j r / k to (j + 1) r / k of gralora_A[n], and
B_j[n] are rows n r / k to (n + 1) r / k of gralora_B[j].  gralora_A_general.weight (h, I) and gralora_B_general.weight
(O, h) are A and B, if `hybrid_r` is set.  Block rows share no ranks, so the change has rank k r + h.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import alpha_of, matrix_delta, number, of_type, stored_transposed, weight_shape
from tpeft_deploy.formats.peft.dense import dense_change, misfit, require_values
from tpeft_deploy.formats.products.compact import dense_is_smaller, widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-gralora"
ABOUT = About("PEFT", "GraLoRA", "linear, Conv1D", "no", "low-rank, dense", types=("GRALORA",))
_A, _B = "gralora_A", "gralora_B"
_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")
SUFFIXES = frozenset({_A, _B, *_GENERAL})
matches = of_type("GRALORA", _A)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change: of rank k r + h if that has fewer elements, else dense.

    Raises:
        FormatError: a tensor is missing or does not fit.
    """
    no_scale(module, checkpoint)
    first, last = widen(take(module, checkpoint, _A)), widen(take(module, checkpoint, _B))
    require_values(module, checkpoint, **{_A: first, _B: last})
    if first.ndim != 3 or last.ndim != 3 or first.shape[::2] != last.shape[:2] or first.shape[2] % first.shape[0]:
        raise misfit(
            module,
            checkpoint,
            "blocks (k, I/k, r) and (k, r, O/k), r a multiple of k",
            f"{first.shape} and {last.shape}",
        )
    count, width, rank = first.shape
    outputs, inputs = count * last.shape[2], count * width
    shape = weight_shape(f"{module.name}.weight", checkpoint)
    if shape is not None and sorted(shape) != sorted((outputs, inputs)):
        raise misfit(module, checkpoint, f"blocks of a weight {shape}", f"{(outputs, inputs)}")
    down, up = _general(module, checkpoint, outputs, inputs)
    scale = alpha_of(checkpoint, module.name, rank, "alpha") / (rank + len(down))
    transposed = stored_transposed(module, checkpoint, outputs, inputs)
    ranks = (count * rank + len(down),) * 2
    if dense_is_smaller(ranks, (outputs, inputs)):
        change = scale * (_dense(first, last) + np.matmul(up, down, dtype=np.float64))
        return dense_change(module, change.astype(first.dtype), transposed=transposed)
    left, right = _factors(first, last)
    delta = matrix_delta(np.hstack([left, up]), np.vstack([right, down]), scale, transposed=transposed)
    return Change(deltas={f"{module.name}.weight": delta})


def _general(module: Module, checkpoint: Checkpoint, outputs: int, inputs: int) -> tuple[Array, Array]:
    """A (h, I) and B (O, h) of the plain LoRA; h is 0 if there is none."""
    hybrid = number(checkpoint.config, "hybrid_r", checkpoint.source)
    if hybrid == 0:
        return np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32)
    down, up = (take(module, checkpoint, name) for name in _GENERAL)
    if down.shape != (hybrid, inputs) or up.shape != (outputs, hybrid):
        raise misfit(
            module,
            checkpoint,
            f"factors ({hybrid:g}, {inputs}) and ({outputs}, {hybrid:g})",
            f"{down.shape} and {up.shape}",
        )
    return widen(down), widen(up)


def _blocks(first: Array, last: Array) -> tuple[Array, Array]:
    """A as (n, i, j, t) and B as (j, n, t, o), of ranks t of each block."""
    count, width, rank = first.shape
    return (
        first.reshape(count, width, count, rank // count),
        last.reshape(count, count, rank // count, last.shape[2]),
    )


def _dense(first: Array, last: Array) -> Array:
    down, up = _blocks(first.astype(np.float64), last)
    outputs, inputs = last.shape[0] * last.shape[2], first.shape[0] * first.shape[1]
    change: Array = np.einsum("nijt,jnto->joni", down, up, optimize=True)
    return change.reshape(outputs, inputs)


def _factors(first: Array, last: Array) -> tuple[Array, Array]:
    """(O, k r) and (k r, I), ranks in the order (j, n, t)."""
    count, width, rank = first.shape
    down, _ = _blocks(first, last)
    left = np.zeros((count, last.shape[2], count, rank), last.dtype)
    right = np.zeros((count, count, rank // count, count, width), first.dtype)
    for block in range(count):
        left[block, :, block] = last[block].T
        right[:, block, :, block] = down[block].transpose(1, 2, 0)
    return left.reshape(-1, count * rank), right.reshape(count * rank, -1)
