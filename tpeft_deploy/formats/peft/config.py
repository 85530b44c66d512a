"""What the readers of PEFT's methods share: settings of adapter_config.json, and where a change goes in the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpeft_deploy.errors import FormatError, ShapeError, brief
from tpeft_deploy.formats.products.compact import low_rank
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, needs_base
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
    """Whether adapter_config.json states this `peft_type`."""
    return checkpoint.config.get("peft_type") == peft_type


def number(config: Mapping[str, Any], name: str, source: str) -> float:
    """A number that the configuration must have.

    Raises:
        FormatError: it is absent, not a number, or not finite.
    """
    return _finite(config.get(name), name, source)


def by_pattern(checkpoint: Checkpoint, patterns: str, name: str, default: str) -> float:
    """A setting that may differ per module: the first pattern that matches the module's name, as PEFT matches it.

    Args:
        checkpoint: whose configuration holds both fields.
        patterns: field that maps a regular expression to a value; it must match the end of the name from a dot on.
        name: the module's name, or the parameter's for `target_parameters`.
        default: field of the value where no pattern matches.

    Raises:
        FormatError: the value is not a finite number, or a pattern is none that is matched (`Patterns.first`).
    """
    pattern = checkpoint.matcher(patterns, whole=False).first(checkpoint.trained_name(name))
    if pattern is None:
        return number(checkpoint.config, default, checkpoint.source)
    return _finite(checkpoint.config[patterns][pattern], f"{patterns}[{pattern!r}]", checkpoint.source)


def alpha_of(checkpoint: Checkpoint, name: str, rank: int, field: str) -> float:
    """The alpha of a module, once it is certain that its tensors belong to this configuration.

    Args:
        checkpoint: whose configuration is asked.
        name: the module's name, or the parameter's for `target_parameters`.
        rank: of the module's tensors.
        field: "lora_alpha" or "alpha".

    Raises:
        FormatError: the configuration lacks alpha or r, or states another rank.
    """
    alpha = by_pattern(checkpoint, "alpha_pattern", name, field)
    stated = by_pattern(checkpoint, "rank_pattern", name, "r")
    if stated != rank:
        raise FormatError(
            f"read {checkpoint.source}, module {name!r}",
            expected=f"tensors of rank {stated:g}, as adapter_config.json says",
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
    """A number of JSON as a float; None for what is no number, or none that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def weight_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The shape of a base parameter; None when no base was given, or it has no such parameter."""
    if checkpoint.base is None or name not in checkpoint.base.weights:
        return None
    return checkpoint.base.shape(name)


def base_bias(module: Module, checkpoint: Checkpoint, why: str) -> Array | None:
    """The bias of a module in float64, None where the layer has none; `why` is what it is needed for, as a clause.

    Raises:
        FormatError: no base was given, or the file replaces the bias as well, so that it is not known which comes
            first.
    """
    if checkpoint.base is None:
        raise needs_base(module, checkpoint, why)
    trained = checkpoint.config.get("bias", "none")
    if trained != "none":
        raise FormatError(
            doing(module, checkpoint),
            expected="an adapter that changes biases in one way",
            got=f"bias={trained!r} in its configuration, and a method that changes biases too",
            fix="Train again with bias='none'.",
        )
    bias = checkpoint.base.weights.get(f"{module.name}.bias")
    return None if bias is None else bias.astype(np.float64)


def stored_transposed(module: Module, checkpoint: Checkpoint, outputs: int, inputs: int) -> bool:
    """Whether the layer is a transformers Conv1D, whose weight is stored as (inputs, outputs).

    PEFT overwrites `fan_in_fan_out` for the whole adapter with what the last layer needed, so a base decides where
    there is one.
    """
    name = f"{module.name}.weight"
    shape = weight_shape(name, checkpoint)
    if shape is None:
        return bool(checkpoint.config.get("fan_in_fan_out"))
    if outputs != inputs:
        return shape == (inputs, outputs)
    kind = checkpoint.base.kinds.get(module.name) if checkpoint.base is not None else None
    return bool(checkpoint.config.get("fan_in_fan_out")) if kind is None else kind == "Conv1D"


def matrix_delta(
    up: Array, down: Array, scale: float, *, transposed: bool = False, core: Array | None = None
) -> TuckerDelta:
    """The change s * up core down of a linear weight (O, I), or its transpose.

    Args:
        up: (O, R).
        down: (R, I).
        scale: s.
        transposed: the weight is stored as (I, O).
        core: (R, R); an identity when left out.
    """
    if core is None:
        return low_rank(down.T, up.T, scale) if transposed else low_rank(up, down, scale)
    return TuckerDelta(core.T, (down.T, up), scale) if transposed else TuckerDelta(core, (up, down.T), scale)


def diagonal_delta(up: Array, values: Array, down: Array, scale: float, *, transposed: bool = False) -> TuckerDelta:
    """The change s * up diag(values) down of a linear weight (O, I), or its transpose.

    Args:
        up: (O, R).
        values: (R,).
        down: (R, I).
        scale: s.
        transposed: the weight is stored as (I, O).

    Raises:
        ShapeError: there is another number of values than rows of `down`.
    """
    if values.shape != down.shape[:1]:
        raise ShapeError("build a change", expected=f"{down.shape[:1]} values for its diagonal", got=values.shape)
    if len(values) > min(up.shape[0], down.shape[-1]):
        return matrix_delta(up, values[:, None] * down, scale, transposed=transposed)
    return matrix_delta(up, down, scale, transposed=transposed, core=np.diag(values))
