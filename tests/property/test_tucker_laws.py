"""Laws of the algebra, for any shape, rank and pattern of identity factors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.property.deltas import deltas
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.slots import Kind, Target
from tpeft_deploy.tucker import TuckerDelta, mode_product


def explicit(delta: TuckerDelta) -> np.ndarray:
    """The defining sum, written out with one einsum: an independent oracle."""
    core, result = "abcde"[: delta.core.ndim], "vwxyz"[: delta.core.ndim]
    factors = [np.eye(r) if f is None else f for f, r in zip(delta.factors, delta.ranks, strict=True)]
    pairs = ",".join(f"{big}{small}" for big, small in zip(result, core, strict=True))
    total: np.ndarray = np.einsum(f"{core},{pairs}->{result}", delta.core, *factors)
    return delta.scale * total


@given(deltas())
def test_dense_is_the_defining_sum(delta: TuckerDelta) -> None:
    assert delta.dense().shape == delta.shape
    np.testing.assert_allclose(delta.dense(), explicit(delta), rtol=1e-10, atol=1e-10)


@given(deltas(), st.data())
def test_absorbing_any_modes_changes_nothing(delta: TuckerDelta, data: st.DataObject) -> None:
    modes = data.draw(st.lists(st.integers(0, delta.core.ndim - 1), unique=True))
    absorbed = delta.absorb(modes)
    assert absorbed.shape == delta.shape
    assert all(absorbed.factors[mode] is None for mode in modes)
    np.testing.assert_allclose(absorbed.dense(), delta.dense(), rtol=1e-9, atol=1e-9)


@given(deltas())
def test_the_norm_needs_no_dense_change(delta: TuckerDelta) -> None:
    np.testing.assert_allclose(delta.norm(), np.linalg.norm(delta.dense()), rtol=1e-9, atol=1e-9)


@given(deltas(), st.data())
def test_mode_products_along_different_modes_commute(delta: TuckerDelta, data: st.DataObject) -> None:
    first, second = data.draw(st.permutations(range(delta.core.ndim)))[:2]
    a = np.arange(2.0 * delta.core.shape[first]).reshape(2, -1)
    b = np.arange(3.0 * delta.core.shape[second]).reshape(3, -1)
    one = mode_product(mode_product(delta.core, a, first), b, second)
    other = mode_product(mode_product(delta.core, b, second), a, first)
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def from_slots(target: Target, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What the graph's branch adds to the weight."""
    if target.kind == "linear":
        product: np.ndarray = tensors["down"] @ tensors["up"]
        return product.T
    transposed = target.kind == "conv_transpose"
    total = tensors["core"]
    if target.kind == "weight":
        first = total.shape[0]
        second = tensors["down"].shape[1] if "down" in tensors else target.shape[1]
        total = total.reshape(first, second, *target.shape[2:])
        matrices = dict(tensors)
    else:
        matrices = {n: array.reshape(array.shape[:2]) for n, array in tensors.items() if n != "core"}
        matrices |= {"down": matrices["down"].T} if "down" in matrices else {}
    for name, mode in (("up", int(transposed)), ("down", 1 - transposed)):
        total = mode_product(total, matrices[name], mode) if name in matrices else total
    return total


def target_of(delta: TuckerDelta, kind: Kind, factors: tuple[int, ...] | None = None) -> Target:
    return Target("w", kind, delta.shape, "float64", factors)


CHOICES: list[tuple[Kind, tuple[int, ...]]] = [
    *((kind, factors) for kind in ("conv", "conv_transpose") for factors in ((0,), (1,), (0, 1))),
    *(("weight", factors) for factors in ((), (0,), (1,), (0, 1))),
]


@given(deltas(min_modes=3), st.sampled_from(CHOICES))
def test_any_choice_of_factors_holds_the_whole_change(delta: TuckerDelta, choice: tuple[Kind, tuple[int, ...]]) -> None:
    target = target_of(delta, *choice)
    tensors = slots.fill(target, delta)
    slots.ranks_of(target, tensors)
    np.testing.assert_allclose(from_slots(target, tensors), delta.dense(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(slots.change_of(target, tensors), delta.dense(), rtol=1e-9, atol=1e-9)
    narrow = slots.fill(replace(target, dtype="float32"), delta)
    np.testing.assert_allclose(from_slots(target, narrow), delta.dense(), rtol=1e-5, atol=1e-6 * (1 + delta.norm()))


@given(deltas(min_modes=3), st.sampled_from(["conv", "conv_transpose", "weight"]))
def test_the_best_choice_holds_no_more_numbers_than_any_exact_form(delta: TuckerDelta, kind: Kind) -> None:
    factors = slots.best_factors(kind, delta.shape, [delta.ranks])
    held = sum(a.size for a in slots.fill(target_of(delta, kind if factors else "weight", factors), delta).values())
    whole = delta.dense()
    outputs, inputs, *kernel = whole.shape
    ranks = [np.linalg.matrix_rank(np.moveaxis(whole, mode, 0).reshape(whole.shape[mode], -1)) for mode in (0, 1)]
    compressed = int(math.prod(ranks) * math.prod(kernel) + ranks[0] * outputs + ranks[1] * inputs)
    stored = delta.absorb(range(2, whole.ndim)).parameters  # kernels run whole
    assert held <= min(whole.size, stored, compressed if whole.any() else whole.size)


@given(deltas(min_modes=3), st.sampled_from(CHOICES))
def test_both_factors_hold_at_most_three_times_as_much(
    delta: TuckerDelta, choice: tuple[Kind, tuple[int, ...]]
) -> None:
    # Whatever is added later: a bundle exported without adapters has both.
    kind, factors = choice
    own, both = (
        sum(array.size for array in slots.fill(target_of(delta, kind, modes), delta).values())
        for modes in (factors, (0, 1))
    )
    assert both <= 3 * own


@given(deltas(), st.sampled_from(["linear", "conv", "weight"]))
def test_slots_hold_the_whole_change(delta: TuckerDelta, kind: Kind) -> None:
    if kind == "linear" and delta.core.ndim != 2:
        kind = "weight"
    target = target_of(delta, kind)
    tensors = slots.fill(target, delta)
    assert list(tensors) == [slot.name for slot in slots.slots_of(target)]
    np.testing.assert_allclose(from_slots(target, tensors), delta.dense(), rtol=1e-9, atol=1e-9)


@given(deltas(), deltas(), st.sampled_from(["conv", "weight"]))
def test_padding_to_a_common_rank_is_exact(delta: TuckerDelta, other: TuckerDelta, kind: Kind) -> None:
    target = target_of(delta, kind)
    tensors = slots.fill(target, delta)
    more = {letter: size + 2 for letter, size in slots.ranks_of(target, tensors).items()}
    padded = {
        slot.name: slots.pad(tensors[slot.name], [more[s] if isinstance(s, str) else s for s in slot.shape])
        for slot in slots.slots_of(target)
    }
    np.testing.assert_allclose(from_slots(target, padded), delta.dense(), rtol=1e-9, atol=1e-9)


@given(deltas(), st.sampled_from(["conv", "weight"]))
def test_neutral_slots_change_nothing_and_stack_with_any_rank(delta: TuckerDelta, kind: Kind) -> None:
    target = target_of(delta, kind)
    tensors, none = slots.fill(target, delta), slots.neutral(target)
    assert all(array.size for array in (*tensors.values(), *none.values()))  # cuDNN refuses convs of rank 0
    banks = {name: slots.stack([none[name], tensors[name]]) for name in tensors}
    assert not from_slots(target, {name: bank[0] for name, bank in banks.items()}).any()
    row = from_slots(target, {name: bank[1] for name, bank in banks.items()})
    np.testing.assert_allclose(row, delta.dense(), rtol=1e-9, atol=1e-9)
