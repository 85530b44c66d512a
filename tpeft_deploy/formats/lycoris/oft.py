"""Diag-OFT and BOFT as LyCORIS writes them: a layer's outputs are rotated (arXiv 2306.07280, 2311.06243).

diag-OFT    W' = rescale * R^T W, R = blockdiag(R_1 .. R_n)          oft_blocks (n, b, b)
BOFT        W' = rescale * M_m .. M_1 W, each of n blocks            oft_blocks (m, n, b, b)

R = (I + Q) (I - Q)^-1 with Q = oft_blocks - oft_blocks^T.  alpha is the constraint: if it is above 0, the Q of all
blocks together are shortened to norm alpha O.  rescale (O, 1, ...) exists only with `rescaled`.  The bias is not
changed: LyCORIS rotates it in bypass_mode, which the file does not record.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.base.weight_changes import base_weight, cayley, change_of_base, dense_delta
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array

__all__ = ["read_oft"]

_BLOCKS, _RESCALE, _ALPHA = "oft_blocks", "rescale", "alpha"


@reader(
    "lycoris-oft",
    About("LyCORIS", "Diag-OFT, BOFT", "linear, conv", "yes", "dense"),
    {_BLOCKS, _RESCALE, _ALPHA},
    marks={_BLOCKS},
)
def read_oft(module: Module) -> Change:
    """The module's W' - W."""
    weight = base_weight(module, "OFT")
    stored = module.take(_BLOCKS)
    constraint = _constraint(module)
    rescale = module.tensors.pop(_RESCALE, np.ones((1,) * weight.ndim))
    with module.reporting():
        rows = weight.reshape(len(weight), -1)
        if stored.ndim not in (3, 4) or 0 in stored.shape or stored.shape[-3] * stored.shape[-1] != len(rows):
            raise ValueError(f"blocks {stored.shape} for a weight of shape {weight.shape}")
        if rescale.shape not in {(1,) * weight.ndim, (len(rows), *[1] * (weight.ndim - 1))}:
            raise ValueError(f"rescale of shape {rescale.shape} for a weight of shape {weight.shape}")
        rotations = _rotations(stored.astype(np.float64), constraint * len(rows))
        turned = _diagonal(rows, rotations) if stored.ndim == 3 else _butterfly(rows, rotations)
        return change_of_base(module, dense_delta(rescale * turned.reshape(weight.shape), weight, stored))


def _constraint(module: Module) -> float:
    alpha = module.take(_ALPHA)
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise FormatError(module.doing, expected="one finite number as alpha", got=f"{alpha.reshape(-1)[:4].tolist()}")
    return float(alpha.reshape(()))


def _rotations(blocks: Array, longest: float) -> Array:
    skew = blocks - blocks.swapaxes(-1, -2)
    length = np.linalg.norm(skew.reshape(-1)) + 1e-8
    return cayley(-skew * (longest / length if 0 < longest < length else 1))


def _diagonal(rows: Array, rotations: Array) -> Array:
    blocks = rows.reshape(*rotations.shape[:2], -1)
    return np.asarray(rotations.swapaxes(-1, -2) @ blocks).reshape(rows.shape)


def _butterfly(rows: Array, rotations: Array) -> Array:
    """At level i, each block rotates outputs that are 2^i half blocks apart."""
    _, count, size, _ = rotations.shape
    for level, matrices in enumerate(rotations):
        apart = 2**level * (size // 2)
        if size % 2 or len(rows) % (2 * apart):
            raise ValueError(f"{count} blocks of size {size} at level {level} of a butterfly")
        pairs = rows.reshape(-1, 2, apart, rows.shape[1]).swapaxes(1, 2)
        turned = np.asarray(matrices @ pairs.reshape(count, size, -1))
        rows = turned.reshape(pairs.shape).swapaxes(1, 2).reshape(rows.shape)
    return rows
