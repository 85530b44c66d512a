"""Readers of PEFT's methods that rotate or reflect the weight."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.base.weight_changes import (
    base_weight,
    cayley,
    change_of_base,
    dense_delta,
    rotate_inputs,
    skew_of_triangle,
)
from tpeft_deploy.formats.peft.config import base_bias, matrix_delta, number
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_boft", "read_hra", "read_oft", "read_road"]

_LAYER, _EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"
_MOST_TERMS = 100


@reader(
    "peft-oft",
    About("PEFT", "OFT", "linear, embedding, conv with a kernel of 1", "yes", "dense", types=("OFT",)),
    {_LAYER, _EMBEDDING},
    may_be_empty={_LAYER, _EMBEDDING},
)
def read_oft(module: Module) -> Change:
    """OFT as PEFT saves it: blocks of a layer's inputs are rotated (arXiv 2306.07280, 2506.19847).

    y = W (x B) + b        W' = W B^T        B = blockdiag(R_1 .. R_n)        oft_R.weight (n, b (b - 1) / 2)

    Each row is the upper triangle of a skew-symmetric Q with R = (I - Q) (I + Q)^-1, or with use_cayley_neumann the
    Neumann sum truncated after num_cayley_neumann_terms, which is not an exact rotation.  coft first limits the norm of
    each Q to eps; block_share repeats one block.  For an embedding the rows are rotated: W' = W B,
    oft_embedding_R.weight.

    Convolutions are read only with a kernel of 1: for larger kernels PEFT rotates overlapping patches and adds them up,
    which is no change of the weight (merge and forward of PEFT differ).
    """
    weight = base_weight(module, "OFT")
    embedding = _EMBEDDING in module.tensors
    angles = module.take(_EMBEDDING if embedding else _LAYER)
    if math.prod(weight.shape[2:]) != 1:
        raise FormatError(
            module.doing,
            expected="a linear layer, an embedding, or a convolution with a kernel of 1",
            got=f"a kernel of {weight.shape[2:]}: PEFT's OFT adds up its rotated patches where they overlap, which is "
            "no change of the weight",
            fix="Train again without this layer in target_modules, or with BOFT or HRA, which change its weight.",
        )
    with module.reporting():
        flat = weight.reshape(len(weight), -1)
        blocks = _oft_blocks(module.checkpoint, angles, flat.shape[1], 1 if weight.ndim == 2 else len(weight))
        if weight.ndim == 2 and len(blocks) * blocks.shape[1] != flat.shape[1]:
            raise ValueError(f"{len(blocks)} blocks of size {blocks.shape[1]} for a weight of shape {weight.shape}")
        adapted = rotate_inputs(flat, blocks.swapaxes(1, 2) if embedding else blocks)
        return change_of_base(module, dense_delta(adapted, weight, angles))


def _oft_blocks(checkpoint: Checkpoint, angles: Array, inputs: int, groups: int) -> Array:
    """Compute the matrices R (n, b, b) for a weight with `inputs` per group and at most `groups` groups."""
    count, elements = angles.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    fits = size * (size - 1) // 2 == elements and size <= inputs
    if not fits or not 0 < count * size <= inputs * max(1, groups):
        raise ValueError(f"angles of shape {angles.shape}, which are those of no blocks within {inputs} inputs")
    values = angles.astype(np.float64)
    if checkpoint.config.get("coft"):
        values = _shortened(values, number(checkpoint, "eps"))
    blocks = _oft_matrices(checkpoint, values, size)
    if checkpoint.config.get("block_share"):
        if count != 1:
            raise ValueError(f"{count} blocks, although block_share is set")
        return np.broadcast_to(blocks, (inputs // size, size, size))
    return blocks


def _oft_matrices(checkpoint: Checkpoint, values: Array, size: int) -> Array:
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
    terms = number(checkpoint, "num_cayley_neumann_terms")
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


_BLOCKS, _SCALE = "boft_R", "boft_s"


@reader(
    "peft-boft",
    About("PEFT", "BOFT", "linear, conv 2d", "yes", "dense", types=("BOFT",)),
    {_BLOCKS, _SCALE},
    marks={_BLOCKS},
)
def read_boft(module: Module) -> Change:
    """BOFT as PEFT saves it: inputs are rotated by a butterfly of blocks, and outputs rescaled (arXiv 2311.06243).

    y = s (W (x M) ) + b        W' = diag(s) W M^T        M = M_m .. M_1, M_i = P_i blockdiag(R_i1 .. R_in) P_i^T

    boft_R (m, n, b, b) of which R = (I - Q) (I + Q)^-1 with Q = (boft_R - boft_R^T) / 2; boft_s (O, 1), or (1, O) for a
    convolution, where M is (I K1 K2, I K1 K2).  The change of a convolution follows the base layer; PEFT's forward
    ignores dilation and padding_mode.
    """
    weight = base_weight(module, "BOFT")
    values, scale = module.take(_BLOCKS), module.take(_SCALE)
    with module.reporting():
        flat = weight.reshape(len(weight), -1)
        factors, count, size, _ = values.shape
        if factors == 0 or count * size != flat.shape[1] or scale.size != len(weight):
            raise ValueError(f"blocks {values.shape} and {scale.size} scales for a weight of shape {weight.shape}")
        skew = values.astype(np.float64)
        rotations = cayley((skew - skew.swapaxes(-1, -2)) / 2)
        for level, blocks in enumerate(rotations):
            order = _butterfly(count, size, level, factors)
            rotated = rotate_inputs(flat[:, np.argsort(order)], blocks)
            flat = rotated[:, order]
        adapted = scale.reshape(-1, 1) * flat
        return change_of_base(module, dense_delta(adapted, weight, values))


def _butterfly(count: int, size: int, level: int, factors: int) -> Array:
    """Permutation of the inputs at a level of the butterfly: halves of blocks, even ones first."""
    inputs = np.arange(count * size)
    if factors == 1:
        return inputs
    if size % 2 or count % 2**level:
        raise ValueError(f"{count} blocks of size {size} for a butterfly of {factors} levels")
    halves = inputs.reshape(-1, 2 ** (level + 1), size // 2)
    return np.concatenate([halves[:, ::2], halves[:, 1::2]], axis=1).reshape(-1)


_VECTORS = "hra_u"


@reader("peft-hra", About("PEFT", "HRA", "linear, conv 2d", "yes", "low-rank", types=("HRA",)), {_VECTORS})
def read_hra(module: Module) -> Change:
    """HRA as PEFT saves it: the weight is reflected r times, which is a change of rank r (arXiv 2405.17484).

    W' = W (I - 2 u_1 u_1^T) .. (I - 2 u_r u_r^T) = W - (W U) T U^T        hra_u (I, r), or (I K1 K2, r) for a
    convolution

    u_i are the normalised columns of hra_u, and T = (I / 2 + triu(U^T U, 1))^-1 (the compact WY form of Schreiber and
    Van Loan, 1989).  With apply_GS the columns are orthogonalised first, so that T = 2 I.  The change of a convolution
    follows the base layer; PEFT's forward ignores dilation and padding_mode.
    """
    weight = base_weight(module, "HRA")
    stored = module.take(_VECTORS)
    with module.reporting():
        flat = weight.reshape(len(weight), -1)
        if stored.ndim != 2 or len(stored) != flat.shape[1]:
            raise ValueError(f"vectors of shape {stored.shape} for a weight of shape {weight.shape}")
        vectors = _unit(stored.astype(np.float64), orthogonal=bool(module.checkpoint.config.get("apply_GS")))
        if vectors.shape[1] >= len(vectors):
            return change_of_base(module, dense_delta(_reflected(flat, vectors), weight, stored))
        return change_of_base(module, _hra_low_rank(weight, vectors, stored))


def _hra_low_rank(weight: Array, vectors: Array, like: Array) -> TuckerDelta:
    gram = vectors.T @ vectors
    triangle = np.linalg.inv(np.eye(len(gram)) / 2 + np.triu(gram, 1))
    up, down = _apart(-(weight.reshape(len(weight), -1) @ vectors) @ triangle, vectors)
    dtype = np.promote_types(like.dtype, np.float32)
    core = down.T.reshape(-1, *weight.shape[1:]).astype(dtype)
    if weight.ndim == 2:
        return matrix_delta(up.astype(dtype), core, 1.0)
    return TuckerDelta(core, (up.astype(dtype), *[None] * (weight.ndim - 1)))


def _apart(up: Array, down: Array) -> tuple[Array, Array]:
    """Rewrite the product with orthogonal columns.

    Training starts from pairs of reflections that cancel: rounded to float32, two large columns would lose the small
    difference between them.
    """
    (left, first), (right, second) = np.linalg.qr(up), np.linalg.qr(down)
    before, sizes, after = np.linalg.svd(first @ second.T)
    root = np.sqrt(sizes)
    rank = len(root)
    return left @ (before[:, :rank] * root), right @ (after[:rank].T * root)


def _reflected(weight: Array, vectors: Array) -> Array:
    for vector in vectors.T:
        weight = weight - 2 * np.outer(weight @ vector, vector)
    return weight


def _unit(vectors: Array, *, orthogonal: bool) -> Array:
    """Normalise the columns; optionally orthogonalise them, from first to last."""
    norms = np.linalg.norm(vectors, axis=0)
    if not norms.all() or not np.isfinite(norms).all():
        raise ValueError("a vector of length zero, or too long")
    units: Array = vectors / norms
    if not orthogonal:
        return units
    basis, triangle = np.linalg.qr(units)
    if basis.shape != units.shape or np.abs(triangle.diagonal()).min() < 1e-6:
        raise ValueError("linearly dependent vectors, which apply_GS cannot make orthogonal")
    return np.asarray(basis)


_THETA, _ALPHA = "road_theta", "road_alpha"
_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}  # numbers of each kind for two outputs


@reader(
    "peft-road",
    About("PEFT", "RoAd", "linear", "yes", "dense, override", types=("ROAD",)),
    {_THETA, _ALPHA},
    marks={_THETA},
)
def read_road(module: Module) -> Change:
    """RoAd as PEFT saves it: pairs of a layer's outputs are rotated and rescaled (arXiv 2409.00119).

    y = R (W x + b)        W' = R W, b' = R b

    Outputs come in groups of group_size; output i of a group's first half is paired with output i of its second half,

        y_i = c_i x_i - s_i x_j        y_j = c_j x_j + s_j x_i        c = alpha cos(theta), s = alpha sin(theta)

    with one alpha and one theta for each pair (road_1), for each output (road_2), or for each c and s (road_4).
    """
    weight = base_weight(module, "RoAd")
    theta, alpha = module.take(_THETA), module.take(_ALPHA)
    size = number(module.checkpoint, "group_size")
    variant = module.checkpoint.config.get("variant")
    expected = _PER_PAIR.get(str(variant), 0) * len(weight) // 2
    if weight.ndim != 2 or size < 2 or size % 2 or len(weight) % size or not theta.size == alpha.size == expected:
        raise FormatError(
            module.doing,
            expected=f"variant {', '.join(_PER_PAIR)} with an even group_size that divides the {len(weight)} outputs "
            "of a linear layer, and an angle and a scale for each of its pairs",
            got=f"variant {variant!r}, group_size {size:g}, {theta.size} angles and {alpha.size} scales",
            fix="Check that the base and adapter_config.json are those of this adapter.",
        )
    with module.reporting():
        cosines, sines = _road_columns(str(variant), int(size), theta.astype(np.float64), alpha.astype(np.float64))
        adapted = _road_rotated(weight, cosines, sines, int(size))
        bias = base_bias(module, "RoAd rotates the base's bias as well")
        if bias is not None:
            turned = _road_rotated(bias[:, None], cosines, sines, int(size))[:, 0]
            bias = turned.astype(np.promote_types(theta.dtype, np.float32))
        return change_of_base(module, dense_delta(adapted, weight, theta), bias=bias)


def _road_columns(variant: str, size: int, theta: Array, alpha: Array) -> tuple[Array, Array]:
    """Compute c and s of each output."""
    if variant == "road_4":
        first, second = theta.reshape(-1, 2, size).swapaxes(0, 1).reshape(2, -1)
        scales = alpha.reshape(-1, 2, size).swapaxes(0, 1).reshape(2, -1)
        return scales[0] * np.cos(first), scales[1] * np.sin(second)
    if variant == "road_1":
        theta, alpha = (np.repeat(a.reshape(-1, size // 2), 2, axis=0).reshape(-1) for a in (theta, alpha))
    return alpha * np.cos(theta), alpha * np.sin(theta)


def _road_rotated(rows: Array, cosines: Array, sines: Array, size: int) -> Array:
    halves = rows.reshape(-1, 2, size // 2, rows.shape[1])
    partners = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(rows.shape)
    rotated: Array = cosines[:, None] * rows + sines[:, None] * partners
    return rotated
