"""RoAd as PEFT saves it: pairs of a layer's outputs are rotated and rescaled (arXiv 2409.00119).

y = R (W x + b)        W' = R W, b' = R b

Outputs come in groups of group_size; output i of a group's first half is paired with output i of its second half,

    y_i = c_i x_i - s_i x_j        y_j = c_j x_j + s_j x_i        c = alpha cos(theta), s = alpha sin(theta)

with one alpha and one theta for each pair (road_1), for each output (road_2), or for each c and s (road_4).
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base, dense_change
from tpeft_deploy.formats.peft.config import base_bias, number, of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-road"
ABOUT = About("PEFT", "RoAd", "linear", "yes", "dense, override", types=("ROAD",))
_THETA, _ALPHA = "road_theta", "road_alpha"
SUFFIXES = frozenset({_THETA, _ALPHA})
_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}  # numbers of each kind for two outputs
matches = of_type("ROAD", _THETA)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W' - W, and the new bias if the layer has one.

    Raises:
        FormatError: no base was given, the tensors do not fit it, or the configuration lacks variant or group_size.
    """
    weight = base_weight(module, checkpoint, "RoAd")
    theta, alpha = take(module, checkpoint, _THETA), take(module, checkpoint, _ALPHA)
    size = number(checkpoint.config, "group_size", checkpoint.source)
    variant = checkpoint.config.get("variant")
    expected = _PER_PAIR.get(str(variant), 0) * len(weight) // 2
    if weight.ndim != 2 or size < 2 or size % 2 or len(weight) % size or not theta.size == alpha.size == expected:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"variant {', '.join(_PER_PAIR)} with an even group_size that divides the {len(weight)} outputs "
            "of a linear layer, and an angle and a scale for each of its pairs",
            got=f"variant {variant!r}, group_size {size:g}, {theta.size} angles and {alpha.size} scales",
            fix="Check that the base and adapter_config.json are those of this adapter.",
        )
    with reporting(module, checkpoint):
        cosines, sines = _columns(str(variant), int(size), theta.astype(np.float64), alpha.astype(np.float64))
        adapted = _rotated(weight, cosines, sines, int(size))
        bias = base_bias(module, checkpoint, "RoAd rotates the base's bias as well")
        if bias is not None:
            turned = _rotated(bias[:, None], cosines, sines, int(size))[:, 0]
            bias = turned.astype(np.promote_types(theta.dtype, np.float32))
        return change_of_base(module, checkpoint, dense_change(adapted, weight, theta), bias=bias)


def _columns(variant: str, size: int, theta: Array, alpha: Array) -> tuple[Array, Array]:
    """Compute c and s of each output."""
    if variant == "road_4":
        first, second = theta.reshape(-1, 2, size).swapaxes(0, 1).reshape(2, -1)
        scales = alpha.reshape(-1, 2, size).swapaxes(0, 1).reshape(2, -1)
        return scales[0] * np.cos(first), scales[1] * np.sin(second)
    if variant == "road_1":
        theta, alpha = (np.repeat(a.reshape(-1, size // 2), 2, axis=0).reshape(-1) for a in (theta, alpha))
    return alpha * np.cos(theta), alpha * np.sin(theta)


def _rotated(rows: Array, cosines: Array, sines: Array, size: int) -> Array:
    halves = rows.reshape(-1, 2, size // 2, rows.shape[1])
    partners = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(rows.shape)
    rotated: Array = cosines[:, None] * rows + sines[:, None] * partners
    return rotated
