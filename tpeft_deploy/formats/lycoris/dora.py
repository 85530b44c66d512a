"""DoRA in LyCORIS' LoCon, LoHa and LoKr: each channel's weights are rescaled to a trained norm.

    W' = (W + dW) dora_scale / (|W + dW| + eps)

The norm is over all axes but one: all but the outputs if dora_scale is (O, 1, ...), all but the inputs if it is
(1, I, 1, ...).  eps is that of float32, in which LyCORIS computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["SUFFIX", "change_with_dora"]

SUFFIX = "dora_scale"


def change_with_dora(
    module: Module,
    delta: TuckerDelta,
    *notes: str | None,
    overrides: Mapping[str, Array] | None = None,
) -> Change:
    """The change of a module: its delta, and a gain if it has a dora_scale, which is popped.

    Args:
        module: module after its `delta` was read.
        checkpoint: checkpoint with a base, if there is a dora_scale.
        delta: dW, (O, I, K1, ...).
        notes: remarks about the weight; None is left out.
        overrides: whole tensors of the module.

    Raises:
        FormatError: no base was given, or dora_scale or dW do not fit its weight.
    """
    target, note = f"{module.name}.weight", "; ".join(text for text in notes if text)
    gains = _gain(module, delta)
    return Change({target: delta}, overrides or {}, gains, {target: note} if note else {})


def _gain(module: Module, delta: TuckerDelta) -> Mapping[str, Array]:
    """Pop dora_scale: the weight's gain, (O, 1, ...) or (1, I, 1, ...), by name; empty if the module has none."""
    magnitude = module.tensors.pop(SUFFIX, None)
    if magnitude is None:
        return {}
    weight = module.base_array("weight", "DoRA's gain depends on the base's weight")
    if delta.shape != weight.shape:
        raise module.misfit(f"a change of shape {weight.shape}, as the base's weight", delta.shape)
    adapted = weight.astype(np.float64) + delta.dense()
    axis = _channel_axis(module, magnitude, weight.shape)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    norm = np.sqrt(np.square(adapted).sum(axis=others, keepdims=True))
    # LyCORIS holds dora_scale in float32 even if the file has 16 bits.
    dtype = np.promote_types(magnitude.dtype, np.float32)
    gain = magnitude.astype(np.float64) / (norm + np.finfo(dtype).eps)
    return {f"{module.name}.weight": gain.astype(dtype)}


def _channel_axis(module: Module, magnitude: Array, shape: tuple[int, ...]) -> int:
    ones = (1,) * (len(shape) - 2)
    fitting = {(shape[0], 1, *ones): 0, (1, shape[1], *ones): 1}
    axis = fitting.get(magnitude.shape)
    if axis is None:
        raise module.misfit(
            f"dora_scale of shape {' or '.join(str(s) for s in fitting)}, as the weight is {shape}", magnitude.shape
        )
    return axis
