"""Readers of PEFT's low-rank methods, other than LoRA, with factors per layer."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.algebra import DENSE, dense_is_smaller, widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.base.weight_changes import base_weight, change_of_base, dense_delta
from tpeft_deploy.formats.peft.config import (
    alpha_of,
    base_bias,
    diagonal_delta,
    is_type,
    matrix_delta,
    number,
    stored_transposed,
    weight_shape,
)
from tpeft_deploy.formats.peft.dense import dense_change, require_values
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_adalora", "read_delora", "read_glora", "read_gralora", "read_miss", "read_miss_bat"]

_ADALORA_A, _E, _ADALORA_B = "lora_A", "lora_E", "lora_B"


@reader(
    "peft-adalora",
    About("PEFT", "AdaLoRA", "linear, Conv1D, conv 2d", "for convolutions", "low-rank", types=("ADALORA",)),
    {_ADALORA_A, _E, _ADALORA_B},
    marks={_E},
    may_be_empty={_ADALORA_A, _E, _ADALORA_B},
)
def read_adalora(module: Module) -> Change:
    """AdaLoRA as PEFT saves it: a low-rank change with a rank that was pruned in training (arXiv 2303.10512).

        dW = s B diag(E) A        lora_B (O, r), lora_E (r, 1), lora_A (r, I), or (r, I K1 K2) for Conv2d
        s = lora_alpha / (init_r + 1e-5)

    PEFT divides by the initial rank, which only `init_r` of adapter_config.json records.  Its `r` is unused, and its
    `rank_pattern` holds masks.
    """
    module.no_scale()
    down, values, up = (module.take(name) for name in (_ADALORA_A, _E, _ADALORA_B))
    target = f"{module.name}.weight"
    scale = _adalora_scale(module.checkpoint)
    if values.shape != (down.shape[0], 1):
        raise FormatError(module.doing, expected=f"lora_E of shape {(down.shape[0], 1)}", got=values.shape)
    if not values.size:
        return Change(notes={target: "AdaLoRA pruned its whole rank: nothing changes"})
    with module.reporting():
        delta = _adalora_delta(module, down, values, up, scale)
    return Change(deltas={target: delta})


def _adalora_scale(checkpoint: Checkpoint) -> float:
    rank = number(checkpoint, "init_r")
    alpha = number(checkpoint, "lora_alpha")
    return (alpha if alpha > 0 else rank) / (rank + 1e-5)  # as in AdaLoraLayer.update_layer


def _adalora_delta(module: Module, down: Array, values: Array, up: Array, scale: float) -> TuckerDelta:
    shape = weight_shape(f"{module.name}.weight", module.checkpoint)
    if shape is not None and len(shape) > 2:
        core = (values * down).reshape(-1, *shape[1:])
        return TuckerDelta(core, (up, *[None] * (len(shape) - 1)), scale)
    transposed = stored_transposed(module, up.shape[0], down.shape[1])
    return diagonal_delta(up, values[:, 0], down, scale, transposed=transposed)


_DELORA_A, _DELORA_B, _LAMBDA, _NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_SMALLEST = 1e-4  # PEFT clamps the norms to this value


@reader(
    "peft-delora",
    About("PEFT", "DeLoRA", "linear", "no", "low-rank", types=("DELORA",)),
    {_DELORA_A, _DELORA_B, _LAMBDA, _NORM},
    marks={_DELORA_A},
)
def read_delora(module: Module) -> Change:
    """DeLoRA as PEFT saves it: LoRA with a bounded norm of the change (arXiv 2503.18225).

        dW = B diag(lambda / (r |a_i| |b_i|)) A diag(n)

    delora_A (r, I) with rows a_i, delora_B (O, r) with columns b_i, delora_lambda (1,), delora_w_norm (I,) as n: the
    norms of the base's columns at the start of training.
    """
    module.no_scale()
    down, up, bound, norm = (module.take(name) for name in (_DELORA_A, _DELORA_B, _LAMBDA, _NORM))
    with module.reporting():
        rows = np.maximum(np.linalg.norm(down.astype(np.float64), axis=1), _SMALLEST)
        columns = np.maximum(np.linalg.norm(up.astype(np.float64), axis=0), _SMALLEST)
        if rows.shape != columns.shape or norm.shape != down.shape[1:]:
            raise ValueError(f"factors {up.shape} and {down.shape}, and norms {norm.shape}")
        values = (bound.reshape(-1) / len(rows) / (rows * columns)).astype(np.promote_types(up.dtype, np.float32))
        delta = diagonal_delta(up, values, down * norm, 1.0)
    return Change(deltas={f"{module.name}.weight": delta})


@reader(
    "peft-glora",
    About("PEFT", "GLoRA", "linear", "yes", "dense, override", types=("GLORA",)),
    {f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")},
)
def read_glora(module: Module) -> Change:
    """GLoRA as PEFT saves it: weight and bias are rescaled and shifted, each by a small tensor (arXiv 2306.07967).

    W' = W + W * A + B        b' = b + b * D + E + W C

    Each of A to E is a product Xd Xu, a tensor X that broadcasts, or absent (a buffer `zeros`): config_A_B, config_C
    and config_D_E decide.  A layer without a bias has neither C, D nor E.
    """
    weight = base_weight(module, "GLoRA")
    like = next(iter(module.tensors.values()))
    with module.reporting():
        if weight.ndim != 2:
            raise ValueError(f"a weight of shape {weight.shape}, where GLoRA changes linear layers")
        outputs, inputs = weight.shape
        scale, shift = (_glora_path(module, path, (outputs, inputs)) for path in "AB")
        through = _glora_path(module, "C", (inputs, 1))
        bias_scale, bias_shift = (_glora_path(module, path, (outputs,)) for path in "DE")
        bias = base_bias(module, "GLoRA changes the base's bias as well")
        if bias is not None:
            bias = bias + bias * bias_scale + bias_shift + (weight @ np.broadcast_to(through, (inputs, 1)))[:, 0]
            bias = bias.astype(np.promote_types(like.dtype, np.float32))
        delta = dense_delta(weight + weight * scale + shift, weight, like)
        return change_of_base(module, delta, bias=bias)


def _glora_path(module: Module, path: str, shape: tuple[int, ...]) -> Array:
    """One of A to E in float64, of a shape that broadcasts to `shape`."""
    zeros = module.tensors.pop(f"glora_{path}.zeros", None)
    if zeros is not None:
        if zeros.any():
            raise ValueError(f"glora_{path}.zeros, which is not zero")
        return np.zeros(1)
    if f"glora_{path}.Xd" not in module.tensors:
        whole = module.take(f"glora_{path}.X").astype(np.float64)
        if whole.shape not in {(1,), (*shape[:1], *[1] * (len(shape) - 1))}:
            raise ValueError(f"glora_{path}.X of shape {whole.shape}, which does not fit {shape}")
        return whole
    left, right = (module.take(f"glora_{path}.{part}").astype(np.float64) for part in ("Xd", "Xu"))
    if (*left.shape[:1], *right.shape[1:]) != shape or left.shape[1:] != right.shape[:1]:
        raise ValueError(f"glora_{path} of shapes {left.shape} and {right.shape}, which do not make {shape}")
    return np.asarray(left @ right)


_GRALORA_A, _GRALORA_B = "gralora_A", "gralora_B"
_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@reader(
    "peft-gralora",
    About("PEFT", "GraLoRA", "linear, Conv1D", "no", "low-rank, dense", types=("GRALORA",)),
    {_GRALORA_A, _GRALORA_B, *_GENERAL},
    marks={_GRALORA_A},
)
def read_gralora(module: Module) -> Change:
    """GraLoRA as PEFT saves it: LoRA in k x k blocks (arXiv 2505.20355), and plain LoRA of rank h beside it.

        block (j, n) of dW = s B_j[n]^T A_n[j]^T, plus s B A        s = alpha / (r + h)

    gralora_A (k, I / k, r) and gralora_B (k, r, O / k): A_n[j] are columns j r / k to (j + 1) r / k of gralora_A[n],
    and B_j[n] are rows n r / k to (n + 1) r / k of gralora_B[j].  gralora_A_general.weight (h, I) and
    gralora_B_general.weight (O, h) are A and B, if `hybrid_r` is set.  Block rows share no ranks, so the change has
    rank k r + h.
    """
    module.no_scale()
    first, last = widen(module.take(_GRALORA_A)), widen(module.take(_GRALORA_B))
    require_values(module, **{_GRALORA_A: first, _GRALORA_B: last})
    if first.ndim != 3 or last.ndim != 3 or first.shape[::2] != last.shape[:2] or first.shape[2] % first.shape[0]:
        raise module.misfit(
            "blocks (k, I/k, r) and (k, r, O/k), r a multiple of k",
            f"{first.shape} and {last.shape}",
        )
    count, width, rank = first.shape
    outputs, inputs = count * last.shape[2], count * width
    shape = weight_shape(f"{module.name}.weight", module.checkpoint)
    if shape is not None and sorted(shape) != sorted((outputs, inputs)):
        raise module.misfit(f"blocks of a weight {shape}", f"{(outputs, inputs)}")
    down, up = _gralora_general(module, outputs, inputs)
    scale = alpha_of(module.checkpoint, module.name, rank, "alpha") / (rank + len(down))
    transposed = stored_transposed(module, outputs, inputs)
    ranks = (count * rank + len(down),) * 2
    if dense_is_smaller(ranks, (outputs, inputs)):
        change = scale * (_gralora_dense(first, last) + np.matmul(up, down, dtype=np.float64))
        return dense_change(module, change.astype(first.dtype), transposed=transposed)
    left, right = _gralora_factors(first, last)
    delta = matrix_delta(np.hstack([left, up]), np.vstack([right, down]), scale, transposed=transposed)
    return Change(deltas={f"{module.name}.weight": delta})


def _gralora_general(module: Module, outputs: int, inputs: int) -> tuple[Array, Array]:
    """A (h, I) and B (O, h) of the plain LoRA; h is 0 if there is none."""
    hybrid = number(module.checkpoint, "hybrid_r")
    if hybrid == 0:
        return np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32)
    down, up = (module.take(name) for name in _GENERAL)
    if down.shape != (hybrid, inputs) or up.shape != (outputs, hybrid):
        raise module.misfit(
            f"factors ({hybrid:g}, {inputs}) and ({outputs}, {hybrid:g})",
            f"{down.shape} and {up.shape}",
        )
    return widen(down), widen(up)


def _gralora_blocks(first: Array, last: Array) -> tuple[Array, Array]:
    """A as (n, i, j, t) and B as (j, n, t, o), of ranks t of each block."""
    count, width, rank = first.shape
    return (
        first.reshape(count, width, count, rank // count),
        last.reshape(count, count, rank // count, last.shape[2]),
    )


def _gralora_dense(first: Array, last: Array) -> Array:
    down, up = _gralora_blocks(first.astype(np.float64), last)
    outputs, inputs = last.shape[0] * last.shape[2], first.shape[0] * first.shape[1]
    change: Array = np.einsum("nijt,jnto->joni", down, up, optimize=True)
    return change.reshape(outputs, inputs)


def _gralora_factors(first: Array, last: Array) -> tuple[Array, Array]:
    """(O, k r) and (k r, I), ranks in the order (j, n, t)."""
    count, width, rank = first.shape
    down, _ = _gralora_blocks(first, last)
    left = np.zeros((count, last.shape[2], count, rank), last.dtype)
    right = np.zeros((count, count, rank // count, count, width), first.dtype)
    for block in range(count):
        left[block, :, block] = last[block].T
        right[:, block, :, block] = down[block].transpose(1, 2, 0)
    return left.reshape(-1, count * rank), right.reshape(count * rank, -1)


_BLOCK = "miss_block"


@reader("peft-miss", About("PEFT", "MiSS", "linear", "yes", "low-rank", types=("MISS",)), {_BLOCK})
def read_miss(module: Module) -> Change:
    """MiSS as PEFT saves it: inputs are summed in strides of r, then multiplied by one small matrix (arXiv 2409.15371).

        dW = D^T S        miss_block D (r, O), S (r, I) = [I_r I_r ...] cut to I columns

    With init_weights='mini' D is (r, mini_r) and repeated along the outputs.  'bat' multiplies by the base weight: see
    `miss_bat`.
    """
    module.no_scale()
    block = module.take(_BLOCK)
    shape = module.base_array("weight", "MiSS does not record the number of inputs of a layer").shape
    if block.ndim != 2 or len(shape) != 2 or shape[0] % block.shape[1]:
        expected = f"a block (r, {shape[0]}), or one that repeats to it, for a weight {shape}"
        raise module.misfit(expected, block.shape)
    with module.reporting():
        outputs, inputs = shape
        block = block[:inputs]  # rows beyond the inputs have no effect
        rank = block.shape[0]
        up = np.tile(block, outputs // block.shape[1]).T
        if rank >= min(outputs, inputs):
            change = np.tile(up, -(-inputs // rank))[:, :inputs]
            target = f"{module.name}.weight"
            return Change(deltas={target: TuckerDelta(change, (None, None))}, notes={target: DENSE})
        sums = np.tile(np.eye(rank, dtype=block.dtype), -(-inputs // rank))[:, :inputs]
        delta = matrix_delta(up, sums, 1.0)
    return Change(deltas={f"{module.name}.weight": delta})


def _is_miss_bat(module: Module) -> bool:
    """Whether a PEFT file of type MISS with init_weights='bat' has blocks for the module."""
    return (
        is_type(module.checkpoint, "MISS")
        and module.checkpoint.config.get("init_weights") == "bat"
        and _BLOCK in module.tensors
    )


@reader(
    "peft-miss-bat",
    About("PEFT", "MiSS (init_weights='bat')", "linear", "yes", "dense"),
    {_BLOCK},
    matches=_is_miss_bat,
)
def read_miss_bat(module: Module) -> Change:
    """MiSS of init_weights='bat' as PEFT saves it: each tile of the weight is multiplied by a block (arXiv 2409.15371).

    W'[o, i] = W[o, i] + W[o, i] D[o] + D[o] for tiles of size (r, r)        miss_block D (O / r, r, r)
    """
    weight = base_weight(module, "MiSS")
    stored = module.take(_BLOCK)
    with module.reporting():
        count, size, _ = stored.shape
        if weight.ndim != 2 or stored.shape != (count, size, size) or count * size != len(weight):
            raise ValueError(f"blocks {stored.shape} for a weight of shape {weight.shape}")
        blocks = stored.astype(np.float64)
        tiles = weight.reshape(count, size, -1, size)
        adapted = tiles + np.einsum("oaib,obc->oaic", tiles, blocks) + blocks[:, :, None]
        return change_of_base(module, dense_delta(adapted, weight, stored))
