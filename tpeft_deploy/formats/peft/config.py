"""Helpers for the readers of PEFT's methods: settings of adapter_config.json, and deltas of linear weights."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.algebra import low_rank
from tpeft_deploy.errors import FormatError, ShapeError, brief
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = [
    "alpha_of",
    "base_bias",
    "by_pattern",
    "diagonal_delta",
    "finite",
    "is_type",
    "matrix_delta",
    "number",
    "stored_transposed",
    "weight_shape",
]

_SAVE_AGAIN = "Save the adapter again with save_pretrained."


def is_type(checkpoint: Checkpoint, peft_type: str) -> bool:
    """Whether adapter_config.json has this `peft_type`."""
    return checkpoint.config.get("peft_type") == peft_type


def number(checkpoint: Checkpoint, name: str) -> float:
    """Read a number that the configuration must have.

    Raises:
        FormatError: the field is absent, not a number, or not finite.
    """
    return _finite(checkpoint.config.get(name), name, checkpoint.source)


def by_pattern(checkpoint: Checkpoint, patterns: str, name: str, default: str) -> float:
    """Read a setting that may differ per module: the first pattern that matches the module's name, as in PEFT.

    Args:
        checkpoint: checkpoint with both fields in its configuration.
        patterns: field that maps a regular expression to a value; it must match the end of the name from a dot on.
        name: name of the module, or of the parameter for `target_parameters`.
        default: field with the value for other modules.

    Raises:
        FormatError: the value is not a finite number, or a pattern is not supported (`Patterns.first`).
    """
    if not checkpoint.config.get(patterns):
        return number(checkpoint, default)
    pattern = checkpoint.matcher(patterns, whole=False).first(checkpoint.trained_name(name))
    if pattern is None:
        return number(checkpoint, default)
    return _finite(checkpoint.config[patterns][pattern], f"{patterns}[{pattern!r}]", checkpoint.source)


def alpha_of(checkpoint: Checkpoint, name: str, rank: int, field: str) -> float:
    """Read the alpha of a module, and check its rank against the configuration.

    Args:
        checkpoint: checkpoint with the configuration.
        name: name of the module, or of the parameter for `target_parameters`.
        rank: rank of the module's tensors.
        field: "lora_alpha" or "alpha".

    Raises:
        FormatError: the configuration lacks alpha or r, or has another rank.
    """
    alpha = by_pattern(checkpoint, "alpha_pattern", name, field)
    stated = by_pattern(checkpoint, "rank_pattern", name, "r")
    if stated != rank:
        raise FormatError(
            f"read {checkpoint.source}, module {name!r}",
            expected=f"tensors of rank {stated:g}, as in adapter_config.json",
            got=f"rank {rank}",
            fix="Copy both files of one adapter.",
        )
    return alpha


def _finite(value: object, name: str, source: str) -> float:
    found = finite(value)
    if found is None:
        raise FormatError(
            f"read {source}, adapter_config.json",
            expected=f"a finite number as {name}",
            got=brief(repr(value)),
            fix=_SAVE_AGAIN,
        )
    return found


def finite(value: object) -> float | None:
    """Convert a JSON value to a float; None if it is not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def weight_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Shape of a base parameter; None if there is no base or no such parameter."""
    if checkpoint.base is None or name not in checkpoint.base.weights:
        return None
    return checkpoint.base.shape(name)


def base_bias(module: Module, why: str) -> Array | None:
    """The bias of a module in float64, or None if the layer has none.

    Args:
        module: module that is read.
        why: purpose of the bias, as a clause for the message.

    Raises:
        FormatError: no base was given, or the file replaces the bias as well, so that the order is ambiguous.
    """
    if module.checkpoint.base is None:
        raise module.needs_base(why)
    trained = module.checkpoint.config.get("bias", "none")
    if trained != "none":
        raise FormatError(
            module.doing,
            expected="an adapter that changes biases in one way",
            got=f"bias={trained!r} in its configuration, and a method that changes biases too",
            fix="Train again with bias='none'.",
        )
    bias = module.checkpoint.base.weights.get(f"{module.name}.bias")
    return None if bias is None else bias.astype(np.float64)


def stored_transposed(module: Module, outputs: int, inputs: int) -> bool:
    """Whether the layer is a transformers Conv1D, with a weight stored as (inputs, outputs).

    PEFT overwrites `fan_in_fan_out` for the whole adapter with the value of the last layer, so the base takes
    precedence.
    """
    name = f"{module.name}.weight"
    shape = weight_shape(name, module.checkpoint)
    if shape is None:
        return bool(module.checkpoint.config.get("fan_in_fan_out"))
    if outputs != inputs:
        return shape == (inputs, outputs)
    kind = module.checkpoint.base.kinds.get(module.name) if module.checkpoint.base is not None else None
    return bool(module.checkpoint.config.get("fan_in_fan_out")) if kind is None else kind == "Conv1D"


def matrix_delta(
    up: Array, down: Array, scale: float, *, transposed: bool = False, core: Array | None = None
) -> TuckerDelta:
    """Build the delta s * up core down of a linear weight (O, I), or its transpose.

    Args:
        up: (O, R).
        down: (R, I).
        scale: factor s.
        transposed: True if the weight is stored as (I, O).
        core: (R, R); default identity.
    """
    if core is None:
        return low_rank(down.T, up.T, scale) if transposed else low_rank(up, down, scale)
    return TuckerDelta(core.T, (down.T, up), scale) if transposed else TuckerDelta(core, (up, down.T), scale)


def diagonal_delta(up: Array, values: Array, down: Array, scale: float, *, transposed: bool = False) -> TuckerDelta:
    """Build the delta s * up diag(values) down of a linear weight (O, I), or its transpose.

    Args:
        up: (O, R).
        values: (R,).
        down: (R, I).
        scale: factor s.
        transposed: True if the weight is stored as (I, O).

    Raises:
        ShapeError: the numbers of values and of rows of `down` differ.
    """
    if values.shape != down.shape[:1]:
        raise ShapeError("build a change", expected=f"{down.shape[:1]} values for its diagonal", got=values.shape)
    if len(values) > min(up.shape[0], down.shape[-1]):
        return matrix_delta(up, values[:, None] * down, scale, transposed=transposed)
    return matrix_delta(up, down, scale, transposed=transposed, core=np.diag(values))
