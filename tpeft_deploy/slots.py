"""Which tensors an adapter feeds to a target's branch, per layer kind.

The one place that knows: exporters write graphs to it, the runtime fills banks by it, bundles check with it.
Every kind is exact for every Tucker delta; they differ in what the graph does with the weight:

| kind | slots | used for |
|---|---|---|
| linear | `down` (I, R), `up` (R, O); y += (x down) up, R = min(R_o, R_i), core absorbed | W (O, I) in x W^T, W[ids] |
| matmul | the same, of a weight stored (I, O) | x W (transformers Conv1D, bare tensors) |
| conv | `down` (R_i, I, 1..), `core` (R_o, R_i, *K), `up` (O, R_o, 1..), kernel factors absorbed | Conv, groups = 1 |
| conv_transpose | `down` (R_i, I, 1..), `core` (R_i, R_o, *K), `up` (O, R_o, 1..) | ConvTranspose, groups = 1 |
| weight | `up` (O, R_o), `core` (R_o, I * K1 ..); W + up core, reshaped | grouped convs and every other use |
| gain_0, gain_1 | `value` (size of that mode); gain * (W + dW) | DoRA, IA3: one factor per index of a mode |
| override | `value` (the tensor itself) | a whole tensor that a task replaces |

Absorbing the core of a matrix keeps min(R_o, R_i) (I + O) numbers, fewer than core and factors apart, and costs one
matrix product less.  A bank stacks one slot of all adapters along a new first axis T, zero-padded to the largest
rank; zero padding is exact.  Graph inputs are named `<weight>.tpeft.<slot>`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = [
    "INDEX",
    "Kind",
    "Part",
    "Slot",
    "Target",
    "fill",
    "input_name",
    "neutral",
    "pad",
    "ranks_of",
    "slots_of",
    "stack",
]

INDEX = "adapter_index"  # input of the banked graph: which bank row each batch row takes

Kind = Literal["linear", "matmul", "conv", "conv_transpose", "weight", "gain_0", "gain_1", "override"]


Part = Literal["delta", "gain_0", "gain_1", "override"]


@dataclass(frozen=True)
class Target:
    """A base weight that adapters may change, and how the graph takes the change.

    Args:
        name: the weight's `named_parameters()` name.
        kind: one of the kinds above.
        shape: the base weight's shape (O, I, K1, ...).
        dtype: numpy name of the dtype that the slots have, e.g. "float32".
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str

    @property
    def part(self) -> Part:
        """What of an adapter it takes; a weight has at most one target for each part."""
        if self.kind in ("gain_0", "gain_1", "override"):
            return self.kind
        return "delta"

    @property
    def key(self) -> str:
        """One name per target of a bundle, e.g. "head.weight:override"."""
        return f"{self.name}:{self.part}"


@dataclass(frozen=True)
class Slot:
    """One tensor of a branch; a size that is a string is a rank, or for an override a size the task chooses."""

    name: str
    shape: tuple[int | str, ...]


def input_name(target: Target, slot: str) -> str:
    """The graph input that takes one slot of a target."""
    return f"{target.name}.tpeft.{target.kind if target.kind.startswith('gain') else slot}"


def slots_of(target: Target) -> tuple[Slot, ...]:
    """The slots of a target, in the order in which its branch takes them."""
    if target.kind == "override":
        return (Slot("value", ("C", *target.shape[1:]) if target.shape else ()),)
    if target.kind in ("gain_0", "gain_1"):
        return (Slot("value", (target.shape[int(target.kind[-1])],)),)
    first, second, *kernel = target.shape
    if target.kind == "linear":
        return Slot("down", (second, "R")), Slot("up", ("R", first))
    if target.kind == "matmul":
        return Slot("down", (first, "R")), Slot("up", ("R", second))
    if target.kind == "weight":
        return Slot("up", (first, "R_o")), Slot("core", ("R_o", second * math.prod(kernel)))
    ones = (1,) * len(kernel)
    if target.kind == "conv_transpose":
        return (
            Slot("down", ("R_i", first, *ones)),
            Slot("core", ("R_i", "R_o", *kernel)),
            Slot("up", (second, "R_o", *ones)),
        )
    return (
        Slot("down", ("R_i", second, *ones)),
        Slot("core", ("R_o", "R_i", *kernel)),
        Slot("up", (first, "R_o", *ones)),
    )


def fill(target: Target, change: TuckerDelta | Array) -> dict[str, Array]:
    """The slots of one adapter for one target, contracted in float64 and cast to the target's dtype.

    Args:
        target: where the change goes.
        change: a delta of the target's shape; for a gain or an override the array itself.

    Returns:
        Slot name -> contiguous array of the slot's shape with the adapter's own ranks.
    """
    tensors = _FILL[target.kind](change) if isinstance(change, TuckerDelta) else {"value": change}
    return {name: np.asarray(array, dtype=target.dtype, order="C") for name, array in tensors.items()}


def neutral(target: Target) -> dict[str, Array]:
    """Slots of rank 1 that change nothing.  Rank 0 would do on the CPU; it is unproved on CUDA.

    An override has no neutral value: its slot's default is the base's own tensor.
    """
    if target.part in ("gain_0", "gain_1"):
        return {slot.name: np.ones(slot.shape, target.dtype) for slot in slots_of(target)}  # type: ignore[arg-type]
    sizes = {slot.name: tuple(1 if isinstance(s, str) else s for s in slot.shape) for slot in slots_of(target)}
    return {name: np.zeros(shape, target.dtype) for name, shape in sizes.items()}


def ranks_of(target: Target, tensors: Mapping[str, Array]) -> dict[str, int]:
    """The sizes that stand for the slot shapes' letters, e.g. {"R_i": 8, "R_o": 16}.

    Raises:
        ShapeError: a slot is missing or has another shape, or two slots disagree about a rank: ONNX Runtime would say
            so only from the middle of a run, or not at all.
    """
    letters: dict[str, tuple[int, str]] = {}
    doing = f"fill the branch of weight {target.name!r}"
    for slot in slots_of(target):
        array = tensors.get(slot.name)
        if array is None or array.ndim != len(slot.shape):
            got = "nothing" if array is None else array.shape
            raise ShapeError(doing, expected=f"{slot.name} of shape {slot.shape}", got=got)
        for size, wanted in zip(array.shape, slot.shape, strict=True):
            first, owner = (
                (wanted, slot.name) if isinstance(wanted, int) else letters.setdefault(wanted, (size, slot.name))
            )
            if size != first:
                told = f"{wanted} = {first}, as in {owner}" if isinstance(wanted, str) else f"shape {slot.shape}"
                raise ShapeError(doing, expected=f"{slot.name} with {told}", got=array.shape)
    return {letter: size for letter, (size, _) in letters.items()}


def pad(array: Array, shape: Sequence[int]) -> Array:
    """Zero-pad at the end of every axis to `shape`."""
    if array.shape == tuple(shape):
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def stack(rows: Sequence[Array]) -> Array:
    """A bank: the rows, zero-padded to their largest size along every axis, along a new first axis T."""
    shape = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    return np.stack([pad(row, shape) for row in rows])


def _factor(delta: TuckerDelta, mode: int) -> Array:
    factor = delta.factors[mode]
    return np.eye(delta.ranks[mode]) if factor is None else factor.astype(np.float64)


def _linear(delta: TuckerDelta) -> dict[str, Array]:
    core = delta.scale * delta.core.astype(np.float64)
    up, down = _factor(delta, 0), _factor(delta, 1)
    if core.shape[1] <= core.shape[0]:
        return {"down": down, "up": (up @ core).T}
    return {"down": down @ core.T, "up": up.T}


def _matmul(delta: TuckerDelta) -> dict[str, Array]:
    slots = _linear(delta)
    return {"down": slots["up"].T, "up": slots["down"].T}


def _conv(delta: TuckerDelta) -> dict[str, Array]:
    core = delta.absorb(range(2, delta.core.ndim)).core * delta.scale
    return {"down": _pointwise(_factor(delta, 1).T, core), "core": core, "up": _pointwise(_factor(delta, 0), core)}


def _conv_transpose(delta: TuckerDelta) -> dict[str, Array]:
    core = delta.absorb(range(2, delta.core.ndim)).core * delta.scale
    return {"down": _pointwise(_factor(delta, 0).T, core), "core": core, "up": _pointwise(_factor(delta, 1), core)}


def _pointwise(matrix: Array, core: Array) -> Array:
    """A matrix as the weight of a conv whose kernel is a single point."""
    return matrix.reshape(*matrix.shape, *(1,) * (core.ndim - 2))


def _weight(delta: TuckerDelta) -> dict[str, Array]:
    core = delta.absorb(range(1, delta.core.ndim)).core * delta.scale
    up, core = _factor(delta, 0), core.reshape(core.shape[0], -1)
    if core.shape[0] > core.shape[1]:  # a depthwise kernel has fewer taps than channels
        up, core = up @ core, np.eye(core.shape[1])
    return {"up": up, "core": core}


_FILL = {"linear": _linear, "matmul": _matmul, "conv": _conv, "conv_transpose": _conv_transpose, "weight": _weight}
