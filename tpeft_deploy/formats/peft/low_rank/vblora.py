"""VB-LoRA as PEFT saves it: factors composed of vectors from a bank that all layers share (arXiv 2405.15179).

    dW = B A        each part of L numbers of a row of A, or of a column of B, is sum_k w_k V[i_k]

base_model.vblora_vector_bank is V (N, L).  i and w are the largest `topk` of vblora_logits_A (r, I / L, N) and
vblora_logits_B (O / L, r, N), and their softmax; with save_only_topk_weights the file has *_topk_indices and
*_topk_weights instead, without the last weight, as weights add up to 1.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import matrix_delta, of_type, stored_transposed, weight_shape
from tpeft_deploy.formats.peft.dense import indices, misfit, require_values, whole_number
from tpeft_deploy.formats.products.compact import widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SHARED", "SUFFIXES", "matches", "read"]

NAME = "peft-vblora"
ABOUT = About("PEFT", "VB-LoRA", "linear, Conv1D", "no", "low-rank", types=("VBLORA",))
_BANK = "base_model.vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
SUFFIXES = frozenset(f"{logits}{part}" for logits in _LOGITS for part in ("", _INDICES, _WEIGHTS))
SHARED = frozenset({_BANK})
_RANK = 64  # ranks allowed in addition to the smaller side of a weight: tiny layers may have such ranks
matches = of_type("VBLORA", *SUFFIXES)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of rank r.

    Raises:
        FormatError: the file has no bank; a tensor is missing or does not fit; or an index is out of range.
    """
    no_scale(module, checkpoint)
    if _BANK not in checkpoint.shared:
        raise FormatError(doing(module, checkpoint), expected=f"the shared tensor {_BANK}", got="none")
    bank = widen(checkpoint.shared[_BANK])
    if bank.ndim != 2:
        raise misfit(module, checkpoint, "a bank (N, L)", bank.shape)
    require_values(module, checkpoint, **{_BANK: bank})
    _check_sizes(module, checkpoint, bank.shape[1])
    first, last = (_parts(module, checkpoint, logits, bank) for logits in _LOGITS)  # (r, I/L, L), (O/L, r, L)
    if first.shape[0] != last.shape[1]:
        raise misfit(module, checkpoint, "logits of one rank", f"{first.shape[0]} and {last.shape[1]}")
    down = first.reshape(first.shape[0], -1)
    up = np.swapaxes(last, 1, 2).reshape(-1, last.shape[1])
    transposed = stored_transposed(module, checkpoint, up.shape[0], down.shape[1])
    return Change(deltas={f"{module.name}.weight": matrix_delta(up, down, 1.0, transposed=transposed)})


def _check_sizes(module: Module, checkpoint: Checkpoint, length: int) -> None:
    """Check logits against the weight, before they are expanded with the bank's vectors."""
    shape = weight_shape(f"{module.name}.weight", checkpoint)
    if shape is None:
        return
    first, last = (
        next((module.tensors[n].shape for n in (logits, f"{logits}{_INDICES}") if n in module.tensors), (0, 0, 0))
        for logits in _LOGITS
    )
    sizes = sorted((last[0] * length, first[1] * length)) if len(first) == len(last) == 3 else []
    if sizes != sorted(shape) or first[0] > max(_RANK, min(shape)):
        raise misfit(
            module,
            checkpoint,
            f"vectors of length {length} for a weight {shape}, of rank {max(_RANK, min(shape))} at most",
            f"logits {first} and {last}",
        )


def _parts(module: Module, checkpoint: Checkpoint, logits: str, bank: Array) -> Array:
    """The weighted sums of vectors, (a, b, L)."""
    if logits in module.tensors:
        chosen, weights = _largest(module, checkpoint, take(module, checkpoint, logits), len(bank))
    else:
        chosen = take(module, checkpoint, f"{logits}{_INDICES}")
        saved = take(module, checkpoint, f"{logits}{_WEIGHTS}").astype(np.float64)
        require_values(module, checkpoint, **{f"{logits}{_INDICES}": chosen, _BANK: bank})
        count = whole_number(checkpoint, "topk")
        if chosen.ndim != 3 or chosen.shape[2] != count or saved.shape != (*chosen.shape[:2], chosen.shape[2] - 1):
            raise misfit(
                module, checkpoint, f"{count} indices, and one weight fewer", f"{saved.shape} and {chosen.shape}"
            )
        weights = np.concatenate([saved, 1 - saved.sum(-1, keepdims=True)], axis=-1)
    chosen = indices(module, checkpoint, chosen, len(bank))
    if (np.diff(np.sort(chosen, axis=-1), axis=-1) == 0).any():
        raise misfit(module, checkpoint, "distinct indices", "a duplicate")
    parts = np.zeros((*chosen.shape[:2], bank.shape[1]))
    for place in range(chosen.shape[2]):
        parts += weights[:, :, place, None] * bank[chosen[:, :, place]]
    return parts.astype(bank.dtype)


def _largest(module: Module, checkpoint: Checkpoint, logits: Array, vectors: int) -> tuple[Array, Array]:
    """Indices of the largest logits, and their softmax."""
    require_values(module, checkpoint, logits=logits)
    count = whole_number(checkpoint, "topk")
    if logits.ndim != 3 or logits.shape[2] != vectors or not 0 < count <= vectors:
        raise misfit(module, checkpoint, f"logits of {vectors} vectors, and topk of 1 to as many", logits.shape)
    chosen = np.argpartition(logits, vectors - count, axis=-1)[..., vectors - count :]
    largest = np.take_along_axis(logits, chosen, axis=-1).astype(np.float64)
    powers = np.exp(largest - largest.max(axis=-1, keepdims=True))
    return chosen, powers / powers.sum(axis=-1, keepdims=True)
