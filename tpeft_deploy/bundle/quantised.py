"""Record of a base with weights that the export quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Activations", "Deviation", "Quantise", "Quantised"]

Quantise = Literal["int8", "int4"]
Activations = Literal["int8", "float"]


@dataclass(frozen=True)
class Deviation:
    """Distance of one output of a quantised base from the same output of the base in floating point.

    Args:
        error: relative error, ||quantised - float|| / ||float||, the worst over the sizes that were run.
        cosine: smallest cosine between a quantised row and its row in floating point, rows along the last axis.
        agreement: for the logits of a decoder, the share of tokens with the same largest logit; None for others.
    """

    error: float
    cosine: float
    agreement: float | None = None


@dataclass(frozen=True)
class Quantised:
    """Quantisation that an export was asked for.

    Args:
        form: "int8" or "int4".
        block: number of inputs of a product that share a scale.
        activations: "int8" where ONNX Runtime's CPU rounds the inputs of quantised products to 8 bits, "float" where
            it does not.
        weights: quantised weights; `Manifest.weights` has their shapes, and the digests of what was quantised.
        bytes: bytes of the quantised tensors and their scales in weights.data.
        outputs: output -> distance from the base in floating point, over the example inputs.
    """

    form: Quantise
    block: int
    activations: Activations
    weights: tuple[str, ...]
    bytes: int
    outputs: Mapping[str, Deviation]
