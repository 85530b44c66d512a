"""Slots: the tensors that an adapter feeds to the branch of a target, per layer kind.

Exporters build graphs from these definitions, the runtime fills banks with them, and bundles check adapters against
them.  Every kind is exact for every Tucker delta; the kinds differ in how the graph uses the weight:

| kind | slots | used for |
|---|---|---|
| linear | `down` (I, R), `up` (R, O); y += (x down) up, R = min(R_o, R_i), core absorbed | W (O, I) in x W^T, W[ids] |
| matmul | the same, for a weight stored (I, O) | x W (transformers Conv1D, bare tensors) |
| conv | `down` (R_i, I, 1..), `core` (R_o, R_i, *K), `up` (O, R_o, 1..), kernel factors absorbed | Conv, groups = 1 |
| conv_transpose | `down` (R_i, I, 1..), `core` (R_i, R_o, *K), `up` (O, R_o, 1..) | ConvTranspose, groups = 1 |
| experts | `up` (E, O, R), `down` (E, R, I); dW[e] = up[e] down[e] | one matrix of a stack (E, O, I) per token |
| weight | `up` (O, R_o), `core` (R_o, I * K1 ..); W + up core, reshaped | grouped or dense, every other use |
| gain_0, gain_1 | `value` (size of that mode); gain * (W + dW) | DoRA, IA3: one factor per index of a mode |
| override | `value` (the tensor) | a whole tensor that a task replaces |

`Target.factors` lists the channel modes of a conv or weight with a factor slot; a mode without one is an identity,
which is neither stored nor computed.  A LoRA of a conv, `lora_A` (r, I, *K) and `lora_B` (O, r), is `core`
(R_o, I, *K) and `up`: the Tucker1 form; a Tucker change with both factors is Tucker2 (Kolda and Bader, SIAM Review
51(3), 2009, section 4.2; Kim et al., arXiv 1511.06530).  `best_factors` chooses the factors with the fewest elements;
any change fits any choice exactly, with ranks no larger than those of its unfoldings (for a LoRA with both factors,
R_i = min(I, r K1 ..), at most twice its elements).

Absorbing the core of a matrix leaves min(R_o, R_i) (I + O) elements, fewer than core and factors, and saves one matrix
product.  A bank stacks one slot of all adapters along a new first axis T, zero-padded to the largest rank; zero padding
is exact.  Graph inputs are named `<weight>.tpeft.<slot>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import Array, TuckerDelta, mode_product

__all__ = [
    "INDEX",
    "Kind",
    "Part",
    "Slot",
    "Target",
    "best_factors",
    "change_of",
    "fill",
    "input_name",
    "neutral",
    "pad",
    "ranks_of",
    "slots_of",
    "stack",
]

INDEX = "adapter_index"  # input of the banked graph: bank row of each batch row

Kind = Literal["linear", "matmul", "conv", "conv_transpose", "experts", "weight", "gain_0", "gain_1", "override"]


Part = Literal["delta", "gain_0", "gain_1", "override"]

Modes = tuple[int, ...]
_FACTORS: dict[Kind, Modes] = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "conv": (0, 1),
    "conv_transpose": (0, 1),
    "weight": (0,),
}


@dataclass(frozen=True)
class Target:
    """A base weight that adapters may change, and the layer kind by which the graph applies the change.

    Args:
        name: `named_parameters()` name of the weight.
        kind: one of the kinds above.
        shape: shape of the base weight, (O, I, K1, ...).
        dtype: NumPy name of the slots' dtype, e.g. "float32".
        factors: channel modes (0 and 1 of the shape) with a factor slot; default as in the table above.  Fixed for
            kinds other than conv, conv_transpose and weight.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    factors: Modes | None = None

    def __post_init__(self) -> None:
        factors = _FACTORS.get(self.kind, ()) if self.factors is None else tuple(self.factors)
        if factors not in _choices(self.kind):
            raise ValueError(f"factors {factors} of a target of kind {self.kind}")
        object.__setattr__(self, "factors", factors)

    @property
    def part(self) -> Part:
        """Part of an adapter that the target takes; a weight has at most one target for each part."""
        if self.kind in ("gain_0", "gain_1", "override"):
            return self.kind
        return "delta"

    @property
    def key(self) -> str:
        """Unique name of the target in a bundle, e.g. "head.weight:override"."""
        return f"{self.name}:{self.part}"


@dataclass(frozen=True)
class Slot:
    """One tensor of a branch; a string in its shape is a rank, or for an override a size that the task sets."""

    name: str
    shape: tuple[int | str, ...]


def input_name(target: Target, slot: str) -> str:
    """Name of the graph input for one slot of a target."""
    return f"{target.name}.tpeft.{target.kind if target.kind.startswith('gain') else slot}"


def slots_of(target: Target) -> tuple[Slot, ...]:
    """Slots of a target, in the order of its branch's inputs."""
    if target.kind == "override":
        return (Slot("value", ("C", *target.shape[1:]) if target.shape else ()),)
    if target.kind in ("gain_0", "gain_1"):
        return (Slot("value", (target.shape[int(target.kind[-1])],)),)
    first, second = target.shape[:2]
    if target.kind == "linear":
        return Slot("down", (second, "R")), Slot("up", ("R", first))
    if target.kind == "matmul":
        return Slot("down", (first, "R")), Slot("up", ("R", second))
    if target.kind == "experts":
        return Slot("up", (first, second, "R")), Slot("down", (first, "R", target.shape[2]))
    return _weight_slots(target) if target.kind == "weight" else _conv_slots(target)


def _conv_slots(target: Target) -> tuple[Slot, ...]:
    shape, modes, ones = target.shape, target.factors or (), (1,) * len(target.shape[2:])
    outputs, inputs = _channels(target)
    letters = {outputs: "R_o", inputs: "R_i"}
    core = (letters[mode] if mode in modes else shape[mode] for mode in (0, 1))
    down = [Slot("down", ("R_i", shape[inputs], *ones))] if inputs in modes else []
    up = [Slot("up", (shape[outputs], "R_o", *ones))] if outputs in modes else []
    return (*down, Slot("core", (*core, *shape[2:])), *up)


def _channels(target: Target) -> tuple[int, int]:
    """Modes of the output and of the input channels; a `weight` is treated as (O, I, K1, ...)."""
    return (1, 0) if target.kind == "conv_transpose" else (0, 1)


def _weight_slots(target: Target) -> tuple[Slot, ...]:
    first, second, *kernel = target.shape
    points = math.prod(kernel)
    up, down = Slot("up", (first, "R_o")), Slot("down", (second, "R_i"))
    return {
        # Both sizes are ranks, so that the neutral value is a single zero, not a whole weight.
        (): (Slot("core", ("R_o", "R_i")),),
        (0,): (up, Slot("core", ("R_o", second * points))),
        (1,): (down, Slot("core", (first, "R_i", points))),
        (0, 1): (down, up, Slot("core", ("R_o", "R_i", points))),
    }[target.factors or ()]


def best_factors(kind: Kind, shape: Sequence[int], ranks: Iterable[Sequence[int]]) -> Modes:
    """Choose the factor slots with which a set of changes has the fewest elements; if equal, the fewest slots.

    Args:
        kind: layer kind; only conv, conv_transpose and weight have a choice.
        shape: shape of the weight.
        ranks: per change, the shape of its core.

    Returns:
        Value for `Target.factors`.  () for a conv means that no factor saves elements: use kind weight.
    """
    changes = list(ranks)
    choices = _choices("weight") if kind in ("conv", "conv_transpose") else _choices(kind)
    return min(choices, key=lambda modes: sum(_numbers(shape, core, modes) for core in changes))


def _choices(kind: Kind) -> tuple[Modes, ...]:
    if kind == "weight":
        return (), (0,), (1,), (0, 1)
    if kind in ("conv", "conv_transpose"):
        return (0,), (1,), (0, 1)
    return (_FACTORS.get(kind, ()),)


def _numbers(shape: Sequence[int], ranks: Sequence[int], modes: Modes) -> int:
    """Number of elements that `_reduced` leaves in the slots of a change with a core of shape `ranks`."""
    least = [min(rank, size) for rank, size in zip(ranks, shape, strict=True)]
    for mode in modes:
        least[mode] = min(least[mode], math.prod(least) // least[mode])
    core = [least[mode] if mode in modes else size for mode, size in enumerate(shape)]
    return math.prod(core) + sum(shape[mode] * least[mode] for mode in modes)


def fill(target: Target, change: TuckerDelta | Array) -> dict[str, Array]:
    """Compute the slots of one change, contracted in float64 and cast to the target's dtype.

    Args:
        target: target of the change.
        change: delta of the target's shape; an array for a gain or an override.

    Returns:
        Slot name -> contiguous array of the slot's shape with the adapter's ranks.
    """
    tensors = _FILL[target.kind](target, change) if isinstance(change, TuckerDelta) else {"value": change}
    return {name: np.asarray(array, dtype=target.dtype, order="C") for name, array in tensors.items()}


def change_of(target: Target, tensors: Mapping[str, Array]) -> Array:
    """Compute dW from the slots of a delta, in float64: the inverse of `fill`, up to rounding to the slots' dtype."""
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    if target.kind in ("linear", "matmul"):
        product: Array = wide["down"] @ wide["up"]
        return product.T if target.kind == "linear" else product
    if target.kind == "experts":
        stacked: Array = wide["up"] @ wide["down"]
        return stacked
    change, kernel = wide.pop("core"), target.shape[2:]
    if target.kind == "weight":
        change = change.reshape(len(change), -1 if "down" in wide else target.shape[1], *kernel)
    modes = dict(zip(("up", "down"), _channels(target), strict=True))
    for name, factor in wide.items():
        matrix = factor.reshape(factor.shape[:2])
        transposed = name == "down" and target.kind != "weight"
        change = mode_product(change, matrix.T if transposed else matrix, modes[name])
    return change


def neutral(target: Target) -> dict[str, Array]:
    """Slots of rank 1 that leave the weight unchanged.  cuDNN rejects convolutions of rank 0.

    An override has no neutral value: the default of its slot is the base's tensor.
    """
    if target.part in ("gain_0", "gain_1"):
        return {slot.name: np.ones(slot.shape, target.dtype) for slot in slots_of(target)}  # type: ignore[arg-type]
    sizes = {slot.name: tuple(1 if isinstance(s, str) else s for s in slot.shape) for slot in slots_of(target)}
    return {name: np.zeros(shape, target.dtype) for name, shape in sizes.items()}


def ranks_of(target: Target, tensors: Mapping[str, Array]) -> dict[str, int]:
    """Sizes of the symbols in the slots' shapes, e.g. {"R_i": 8, "R_o": 16}.

    Raises:
        ShapeError: a slot is missing or has another shape, or two slots disagree about a rank.  ONNX Runtime would
            report it only during a run, or not at all.
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
                rule = f"{wanted} = {first}, as in {owner}" if isinstance(wanted, str) else f"shape {slot.shape}"
                raise ShapeError(doing, expected=f"{slot.name} with {rule}", got=array.shape)
    return {letter: size for letter, (size, _) in letters.items()}


def pad(array: Array, shape: Sequence[int]) -> Array:
    """Zero-pad at the end of every axis to `shape`."""
    if array.shape == tuple(shape):
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def stack(rows: Sequence[Array]) -> Array:
    """Stack rows to a bank: along a new first axis T, zero-padded to the largest size along every other axis."""
    shape = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    return np.stack([pad(row, shape) for row in rows])


def _factor(delta: TuckerDelta, mode: int) -> Array:
    factor = delta.factors[mode]
    return np.eye(delta.ranks[mode]) if factor is None else factor.astype(np.float64)


def _linear(_: Target, delta: TuckerDelta) -> dict[str, Array]:
    delta = delta.narrowed()
    core = delta.scale * delta.core.astype(np.float64)
    # An explicit identity on the larger side would be larger than the weight.
    if core.shape[1] <= core.shape[0]:
        up = core if delta.factors[0] is None else _factor(delta, 0) @ core
        return {"down": _factor(delta, 1), "up": up.T}
    down = core.T if delta.factors[1] is None else _factor(delta, 1) @ core.T
    return {"down": down, "up": _factor(delta, 0).T}


def _matmul(target: Target, delta: TuckerDelta) -> dict[str, Array]:
    slots = _linear(target, delta)
    return {"down": slots["up"].T, "up": slots["down"].T}


def _experts(_: Target, delta: TuckerDelta) -> dict[str, Array]:
    """Per expert, the columns of the output and input factors that its slice of the core uses."""
    whole = delta.absorb([0])
    core = whole.core.astype(np.float64) * whole.scale
    outputs, inputs = _factor(whole, 1), _factor(whole, 2)
    # The core of a LoRA over experts is zero outside the rows, or columns, of each expert.
    used = {axis: np.any(core != 0, axis=axis) for axis in (1, 2)}
    rank = max(1, min(int(used[axis].sum(axis=1).max()) for axis in (1, 2)))
    axis = 2 if used[2].sum(axis=1).max() == rank else 1
    up = np.zeros((len(core), len(outputs), rank))
    down = np.zeros((len(core), rank, len(inputs)))
    for e, part in enumerate(core):
        kept = np.flatnonzero(used[axis][e])
        up[e, :, : len(kept)] = outputs[:, kept] if axis == 2 else outputs @ part[:, kept]
        down[e, : len(kept)] = part[kept] @ inputs.T if axis == 2 else inputs[:, kept].T
    return {"up": up, "down": down}


def _conv(target: Target, delta: TuckerDelta) -> dict[str, Array]:
    modes, ones = target.factors or (), (1,) * len(target.shape[2:])
    least = _reduced(delta, modes)
    outputs, inputs = _channels(target)
    tensors = {"core": least.core * least.scale}
    if outputs in modes:
        up = _factor(least, outputs)
        tensors["up"] = up.reshape(*up.shape, *ones)
    if inputs in modes:
        down = _factor(least, inputs).T
        tensors["down"] = down.reshape(*down.shape, *ones)
    return {slot.name: tensors[slot.name] for slot in slots_of(target)}


def _weight(target: Target, delta: TuckerDelta) -> dict[str, Array]:
    modes = target.factors or ()
    least = _reduced(delta, modes)
    first, second = least.ranks[:2]
    core = (least.core * least.scale).reshape((first, second, -1) if 1 in modes else (first, -1))
    tensors = {"core": core} | {("up", "down")[mode]: _factor(least, mode) for mode in modes}
    return {slot.name: tensors[slot.name] for slot in slots_of(target)}


def _reduced(delta: TuckerDelta, modes: Modes) -> TuckerDelta:
    """Rewrite a delta in float64 with factors for `modes` alone, of the smallest ranks that the sizes imply.

    The rank of an unfolding (R_m, rest of the core) is at most the size of the mode and of the rest.  If the rest is
    smaller, the unfolding is absorbed in the factor and replaced by an identity: exact, without a decomposition.
    """
    wide = [m for m, factor in enumerate(delta.factors) if factor is not None and factor.shape[1] >= factor.shape[0]]
    delta = delta.absorb(wide)
    core, factors = delta.core.astype(np.float64), list(delta.factors)
    for mode in modes:
        moved = np.moveaxis(core, mode, 0)
        rest = core.size // len(moved)
        if len(moved) > rest:
            unfolding, factor = moved.reshape(len(moved), rest), factors[mode]
            factors[mode] = unfolding if factor is None else factor.astype(np.float64) @ unfolding
            core = np.moveaxis(np.eye(rest).reshape(rest, *moved.shape[1:]), 0, mode)
    least = TuckerDelta(core, tuple(factors), delta.scale)
    return least.absorb(mode for mode in range(core.ndim) if mode not in modes)


_FILL = {
    "linear": _linear,
    "matmul": _matmul,
    "conv": _conv,
    "conv_transpose": _conv,
    "experts": _experts,
    "weight": _weight,
}
